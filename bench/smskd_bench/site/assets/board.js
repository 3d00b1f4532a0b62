// Puts the board together: filters change the view, the view changes table and pictures.
"use strict";

smskd.board = {
  FILTERS: ["pair", "method", "verdict", "q"],

  start() {
    smskd.view.start();
    smskd.board.choices();
    smskd.board.show();
    smskd.board.listen();
    smskd.table.start();
    smskd.costs.start();
    smskd.curves.update();
    smskd.heat.start();
    smskd.view.listeners.push(smskd.board.changed);
  },

  choices() {
    const methods = new Set(smskd.data.rows.flatMap((row) => row.methods));
    const fill = (id, names) => names.forEach((name) => document.getElementById(id).append(new Option(name, name)));
    fill("pair", smskd.data.pairs);
    fill("method", [...methods].sort());
  },

  /** The form shows the view. A name that the board does not have filters nothing away in silence. */
  show() {
    for (const id of smskd.board.FILTERS) {
      const field = document.getElementById(id);
      field.value = smskd.view.state[id];
      if (field.value !== smskd.view.state[id]) {
        field.append(new Option(`${smskd.view.state[id]} (not on this board)`, smskd.view.state[id]));
        field.value = smskd.view.state[id];
      }
    }
  },

  listen() {
    const form = document.getElementById("filters");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => smskd.view.set({ [event.target.id]: event.target.value }));
    form.addEventListener("reset", () => {
      const { defaults } = smskd.view;
      const names = [...smskd.board.FILTERS, "sort"];
      smskd.view.set(Object.fromEntries(names.map((name) => [name, defaults[name]])));
    });
  },

  /** Only what a change touches is drawn again; pictures after the table was painted. */
  changed(names) {
    smskd.board.show();
    if (names.some((name) => smskd.board.FILTERS.includes(name) || name === "sort")) {
      smskd.table.everything = false;
      smskd.table.update();
    }
    clearTimeout(smskd.board.later);
    smskd.board.later = setTimeout(() => {
      smskd.costs.update();
      smskd.curves.update();
    }, 200);
  },
};

smskd.board.start();
