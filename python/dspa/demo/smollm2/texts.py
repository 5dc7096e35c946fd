"""The text that SmolLM2's SAEs are trained on: prose that Debian ships, and chats that the model writes itself.

`python -m dspa.demo.smollm2.texts FILE` writes it, on Debian or Ubuntu, where `apt-get download` gives the packages.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.prompts import tokenize_prompt
from dspa.demo.smollm2.prompts import chat_prompts
from dspa.errors import require_package
from dspa.evaluate.generation import continue_prompts, end_tokens
from dspa.models.layers import CausalLM

# Characters per document: one that is longer than a reader's context would be cut.
DOCUMENT_CHARACTERS = 1500
N_CHATS, BATCH_SIZE, MAX_NEW_TOKENS = 1600, 48, 110
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 1.0}


@dataclass(frozen=True)
class Prose:
    """English prose in a Debian package.

    Attributes:
        package: name of the package.
        pages: pattern of its pages, in the package's files.
        licence: licence of the text.
        characters: largest number of characters that are taken of it.
    """

    package: str
    pages: str
    licence: str
    characters: int


PROSE = (
    Prose("anarchism", "usr/share/doc/anarchism/html/*.html", "GFDL-1.3+", 1_600_000),
    Prose("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", "GPL-2+ or CC-BY-SA-3.0", 800_000),
    Prose("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", "GFDL-1.2+", 700_000),
    Prose("gnome-user-docs", "usr/share/help/C/*/*.page", "CC-BY-SA-3.0", 400_000),
    Prose("python3.11-doc", "usr/share/doc/python3.11/html/[fhtw]*/*.html", "PSF-2", 900_000),
)


def write_texts(model: CausalLM, tokenizer: PreTrainedTokenizerBase, path: Path, *, seed: int = 0) -> None:
    """Write prose and chats as JSON Lines with `text`, in one random order."""
    require_package("bs4", "Reading prose from web pages", "It is the package beautifulsoup4.")
    documents = [*_prose(seed), *_chats(model, tokenizer, seed)]
    random.Random(seed).shuffle(documents)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)


def _prose(seed: int) -> Iterator[str]:
    """Yield documents of every package, as many as its share allows, drawn by the seed."""
    for prose in tqdm(PROSE, unit="package", desc="prose"):
        with TemporaryDirectory() as folder:
            subprocess.run(["apt-get", "--quiet=2", "download", prose.package], cwd=folder, check=True)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
            pages = [page.read_text(encoding="utf-8") for page in sorted(Path(folder).glob(prose.pages))]
        documents = [document for page in pages for document in _documents(page)]
        random.Random(seed).shuffle(documents)
        n_characters = 0
        for document in documents:
            n_characters += len(document)
            if n_characters > prose.characters:
                break
            yield document


def _documents(page: str) -> Iterator[str]:
    """Yield the paragraphs of a page, as many together as fit a document."""
    from bs4 import BeautifulSoup

    document = ""
    for paragraph in BeautifulSoup(page, "html.parser").find_all("p"):
        text = " ".join(paragraph.get_text().split())
        # Captions, links and other text that is not a sentence.
        if len(text) < 40 or text[-1] not in ".!?:":
            continue
        if document and len(document) + len(text) > DOCUMENT_CHARACTERS:
            yield document
            document = ""
        document += ("\n" if document else "") + text
    if document:
        yield document


def _chats(model: CausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """Yield chats of one turn, in the chat template, that the model completes by itself."""
    asked = chat_prompts(N_CHATS, seed)
    torch.manual_seed(seed)
    ends = end_tokens(model, tokenizer)
    with tqdm(total=len(asked), unit="chat", desc="chats") as bar:
        for start in range(0, len(asked), BATCH_SIZE):
            batch = asked[start : start + BATCH_SIZE]
            prompts = [tokenize_prompt(tokenizer, prompt, chat=True) for prompt in batch]
            for chat in continue_prompts(model, tokenizer, prompts, ends, max_new_tokens=MAX_NEW_TOKENS, **SAMPLING):
                yield str(tokenizer.decode(chat.prompt + chat.ids))
                bar.update()


if __name__ == "__main__":
    from dspa.demo.smollm2.model import load

    write_texts(*load(), Path(sys.argv[1]))
