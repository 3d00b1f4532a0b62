// Sorts and filters the table. All rows come with the page; only those that are shown, at most
// fifty unless all are asked for, stay in the document, so that 2,000 rows answer at once.
"use strict";

smskd.table = {
  PAGE: 50,
  everything: false,
  /** Indices of the rows that the filters leave, in order. */
  shown: [],
  elements: [],

  start() {
    const table = document.getElementById("table");
    const body = table.tBodies[0];
    smskd.table.elements = [...body.rows];
    smskd.table.headings(table);
    document.getElementById("more-button").addEventListener("click", () => {
      smskd.table.everything = true;
      smskd.table.draw();
    });
    smskd.table.update();
    table.classList.add("ready");
  },

  /** Headings become buttons. */
  headings(table) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      cell.append(button);
      button.addEventListener("click", () => smskd.table.sortBy(column));
    });
  },

  /** The first click sorts numbers falling and words rising; the next one turns it round. */
  sortBy(column) {
    const id = smskd.data.columns[column];
    const first = smskd.data.numeric[column] && id !== "rank" ? "-" + id : id;
    const other = first.startsWith("-") ? id : "-" + id;
    smskd.view.set({ sort: smskd.view.state.sort === first ? other : first });
  },

  /** What the address says about order: a column and a direction, or none. */
  order() {
    const sort = smskd.view.state.sort;
    const falling = sort.startsWith("-");
    const column = smskd.data.columns.indexOf(falling ? sort.slice(1) : sort);
    return column < 0 ? null : { column, falling };
  },

  matches(row, words) {
    const { pair, method, verdict } = smskd.view.state;
    return (
      (!pair || smskd.data.pairs[row.pair] === pair) &&
      (!method || row.methods.includes(method)) &&
      (!verdict || row.verdict === verdict) &&
      words.every((word) => row.text.includes(word))
    );
  },

  update() {
    const words = smskd.view.state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = smskd.data.rows;
    smskd.table.shown = rows.map((_, index) => index).filter((i) => smskd.table.matches(rows[i], words));
    smskd.table.arrange();
    smskd.table.draw();
  },

  arrange() {
    const order = smskd.table.order();
    if (!order) return;
    const value = (index) => smskd.data.rows[index].sort[order.column];
    const sign = order.falling ? -1 : 1;
    smskd.table.shown.sort((a, b) => smskd.table.compare(value(a), value(b), sign));
  },

  /** What has no value comes last, whichever way the rest is sorted. */
  compare(one, other, sign) {
    if (one === null || other === null) return (one === null) - (other === null);
    if (typeof one === "string") return sign * (one < other ? -1 : one > other ? 1 : 0);
    return sign * (one - other);
  },

  draw() {
    const { shown, everything, PAGE, elements } = smskd.table;
    const count = everything ? shown.length : Math.min(PAGE, shown.length);
    const body = document.getElementById("table").tBodies[0];
    body.replaceChildren(...shown.slice(0, count).map((index) => elements[index]));
    const total = elements.length;
    const words = shown.length === total ? `${total} rows` : `${shown.length} of ${total} rows`;
    document.getElementById("count").textContent =
      count < shown.length ? `${words}, the first ${count} are shown` : words;
    document.getElementById("more").hidden = count >= shown.length;
    document.getElementById("more-button").textContent = `Show all ${shown.length} rows`;
    smskd.table.marks();
  },

  /** Tell ears and eyes which column sorts. */
  marks() {
    const order = smskd.table.order();
    [...document.getElementById("table").tHead.rows[0].cells].forEach((cell, column) => {
      if (order && order.column === column) {
        cell.setAttribute("aria-sort", order.falling ? "descending" : "ascending");
      } else {
        cell.removeAttribute("aria-sort");
      }
    });
  },
};
