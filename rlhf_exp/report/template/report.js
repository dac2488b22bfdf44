"use strict";
// A click on a head, or Enter on it, sorts its table; a second one the other way round.
const known = (cell) => cell.dataset.value !== undefined || !/^[–\s]*$/.test(cell.textContent);
const compared = (a, b) =>
  a.dataset.value !== undefined && b.dataset.value !== undefined
    ? Number(a.dataset.value) - Number(b.dataset.value)
    : a.textContent.localeCompare(b.textContent, "en", { numeric: true });

for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const index = head.cellIndex;
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows].sort((one, two) => {
      const [a, b] = [one.cells[index], two.cells[index]];
      if (known(a) !== known(b)) return known(a) ? -1 : 1; // what is not known comes last
      return known(a) ? sign * compared(a, b) : 0;
    });
    body.append(...rows);
  });
}

// What is folded is opened for the printer, and folded again.
const folded = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    folded.push(details);
  }
});
addEventListener("afterprint", () => {
  for (const details of folded.splice(0)) details.open = false;
});
