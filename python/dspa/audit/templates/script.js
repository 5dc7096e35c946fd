"use strict";
(() => {
  const table = document.querySelector("#latents table");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const search = document.getElementById("search");
  const group = document.getElementById("group");
  const shown = document.getElementById("shown");

  // Text of a row in lower case, read once.
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const row of rows) {
      const fits = words.every((word) => texts.get(row).includes(word));
      row.hidden = !fits || (group.value !== "" && row.dataset.group !== group.value);
      n += row.hidden ? 0 : 1;
    }
    shown.textContent = `${n} of ${rows.length} latents`;
  }
  search.addEventListener("input", filter);
  group.addEventListener("change", filter);

  // Values that are missing come last, whichever way the column is sorted.
  function compare(a, b, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = Number(a) - Number(b);
    return sign * (Number.isNaN(numbers) ? a.localeCompare(b) : numbers);
  }

  // Numbers from the largest on, texts by the alphabet, and the other way at the next click.
  function sort(header) {
    const sorted = header.getAttribute("aria-sort");
    const falling = sorted ? sorted === "ascending" : header.classList.contains("n");
    const sign = falling ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = (row) => row.cells[header.cellIndex].dataset.value;
    body.append(...rows.sort((a, b) => compare(value(a), value(b), sign)));
  }
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sort(header));
  }

  // The page of the latent that the address names, and the ones before and after it in the table.
  const page = () => document.querySelector("article.latent:target");

  function step(by) {
    const order = rows.filter((row) => !row.hidden).map((row) => row.dataset.page);
    const next = order[order.indexOf(page().id) + by];
    if (next) location.hash = next;
  }
  function leave() {
    const row = rows.find((one) => one.dataset.page === page().id);
    location.hash = "latents";
    row.querySelector("a").focus();
  }
  window.addEventListener("hashchange", () => {
    if (page()) page().querySelector("h1").focus();
  });

  // Edited tokens of a sample: one of them is a stop of the tab key, and arrows move between them.
  function among(marks, mark, by) {
    const next = marks[marks.indexOf(mark) + by];
    if (!next) return;
    mark.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    if (target.matches("input, select")) {
      if (event.key === "Escape") target.blur();
      return;
    }
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && target.matches(".edit")) {
      among(Array.from(target.closest(".text").querySelectorAll(".edit")), target, by);
    } else if (by && page()) {
      step(by);
    } else if (event.key === "Escape" && page()) {
      leave();
    } else if (event.key === "/" && !page()) {
      search.focus();
    } else {
      return;
    }
    event.preventDefault();
  });
  filter();
})();
