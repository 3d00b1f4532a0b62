// Learning curves of the first rows of the table; their numbers come from a file of their own.
"use strict";

smskd.curves = {
  MOST: 6,
  loaded: null,

  update() {
    const rows = smskd.table.shown.slice(0, smskd.curves.MOST);
    smskd.plots.draw(document.getElementById("curves-plot"), () => smskd.curves.make(rows));
  },

  async make(rows) {
    smskd.curves.loaded ??= smskd.dataFile(smskd.data.curves);
    const all = await smskd.curves.loaded;
    const known = rows.filter((index) => all[index]);
    const ends = new Set(known.flatMap((index) => all[index].test[0].slice(0, -1)));
    const traces = known.flatMap((index, place) => smskd.curves.traces(index, place, all[index]));
    const from = Math.min(...known.map((index) => all[index].test[0][0] ?? 0)) / 2;
    return {
      traces,
      layout: {
        xaxis: { title: { text: "epoch of the whole sequence" }, rangemode: "tozero" },
        yaxis: { title: { text: "top-1, %" }, ...smskd.plots.accuracyRange(traces, from) },
        shapes: [...ends].map((end) => ({
          type: "line", xref: "x", yref: "paper", x0: end + 0.5, x1: end + 0.5, y0: 0, y1: 1,
          line: { color: smskd.plots.colour("quiet"), width: 1, dash: "dot" },
        })),
        annotations: known.length ? [] : [{ text: "no row that is shown has a curve", showarrow: false, x: 0.5, y: 0.5, xref: "paper", yref: "paper" }],
      },
    };
  },

  traces(index, place, curve) {
    const { series, short, text, DASHES, SYMBOLS } = smskd.plots;
    const row = smskd.data.rows[index];
    const pair = smskd.data.pairs.length > 1 ? `, ${smskd.data.pairs[row.pair]}` : "";
    const name = row.name + pair;
    const common = { type: "scatter", legendgroup: String(index), name: short(name, 36) };
    const hover = text(name) + "<br>epoch %{x}: %{y:.2f} %<extra></extra>";
    return [
      {
        ...common, mode: "lines", x: curve.train[0], y: curve.train[1], text: curve.train[0].map(() => text(name)),
        line: { color: series(place), width: 1.7, dash: DASHES[place] },
        hovertemplate: "%{text}<br>epoch %{x}: training %{y:.2f} %<extra></extra>",
      },
      {
        ...common, mode: "markers", x: curve.test[0], y: curve.test[1], text: curve.test[0].map(() => text(name)),
        showlegend: !curve.train[0].length, marker: { color: series(place), size: 9, symbol: SYMBOLS[place] },
        hovertemplate: hover.replace(text(name), "%{text}").replace("%{y", "test %{y"),
      },
    ];
  },
};
