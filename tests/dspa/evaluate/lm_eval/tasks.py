"""Tasks of lm-evaluation-harness on local data, for a `word_tokenizer`."""

from __future__ import annotations

import json
from pathlib import Path

from ...support.adapters import words

# Choices of one token, of several, and of lengths that differ. The third differ in the last token alone.
CHOICES = [["cat", "dog", "tree"], ["the old house", "the red sun", "fish"], ["warm sun day", "warm sun night", "snow"]]
DOCUMENTS = [
    {"question": words(n, 2 + n * 5 % 9), "choices": CHOICES[n % 3], "answer": n % 2, "text": words(n + 50, 9)}
    for n in range(9)
]

CHOOSING = """task: choosing
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITING = """task: writing
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["house"], do_sample: false, max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
WHOLE = """task: whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
"""
WITHOUT_CONTEXT = CHOOSING.replace("task: choosing", "task: without_context").replace('"{{question}}"', '""')
BOTH = """group: both
task: [choosing, writing]
"""


def write_tasks(folder: Path) -> Path:
    """Write the tasks and their data, and return the folder of the tasks."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    data = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: test
metadata: {{version: 1.0}}
"""
    for text in (CHOOSING, WRITING, WHOLE, WITHOUT_CONTEXT):
        (tasks / f"{text.split()[1]}.yaml").write_text(text + data)
    (tasks / "both.yaml").write_text(BOTH)
    return tasks
