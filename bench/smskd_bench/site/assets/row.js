// The pictures of one row: curves of each seed, loss terms, TCP and weights.
"use strict";

smskd.row = {
  METRICS: { train_top1: "top-1, %", loss: "loss, sum of all terms", lr: "learning rate" },

  start() {
    const { seeds, terms, tcp } = smskd.data;
    if (!seeds.length) return;
    const metric = document.getElementById("metric");
    metric.addEventListener("change", smskd.row.curves);
    smskd.row.curves();
    if (Object.keys(terms).length) smskd.row.draw("terms-plot", smskd.row.terms);
    if (Object.keys(tcp).length) smskd.row.draw("tcp-plot", smskd.row.tcp);
  },

  draw(id, make) {
    smskd.plots.draw(document.getElementById(id), make);
  },

  curves() {
    smskd.row.draw("curves-plot", smskd.row.makeCurves);
  },

  makeCurves() {
    const metric = document.getElementById("metric").value;
    const traces = smskd.data.seeds.flatMap((seed, place) => smskd.row.ofSeed(seed, place, metric));
    const scale = metric === "train_top1" ? "linear" : "log";
    return smskd.row.picture(traces, { title: { text: smskd.row.METRICS[metric] }, type: scale });
  },

  ofSeed(seed, place, metric) {
    const { series, DASHES, SYMBOLS } = smskd.plots;
    const name = `seed ${seed.seed}`;
    const common = { type: "scatter", name, legendgroup: name };
    const hover = `${name}, epoch %{x}: %{y:.4g}<extra></extra>`;
    const traces = [];
    if (seed[metric]) {
      const [x, y] = seed[metric];
      const line = { color: series(place), width: 1.6, dash: DASHES[place % 6] };
      traces.push({ ...common, mode: "lines", x, y, line, hovertemplate: hover });
    }
    if (metric !== "train_top1") return traces;
    const [x, y] = seed.ends;
    const marker = { color: series(place), size: 9, symbol: SYMBOLS[place % 6] };
    traces.push({ ...common, mode: "markers", x, y, marker, showlegend: !seed[metric], hovertemplate: `test after the stage: ${hover}` });
    for (const [kind, words] of [["test_top1", "test on the way"], ["dev_top1", "development"]]) {
      if (!seed[kind]) continue;
      const cross = { color: series(place), size: 6, symbol: kind === "dev_top1" ? "circle-open" : "x-thin-open" };
      traces.push({ ...common, mode: "markers", x: seed[kind][0], y: seed[kind][1], marker: cross, showlegend: false, hovertemplate: `${words}: ${hover}` });
    }
    return traces;
  },

  terms() {
    const { series, text, DASHES } = smskd.plots;
    const traces = Object.entries(smskd.data.terms).map(([name, [x, y]], place) => ({
      type: "scatter", mode: "lines", name: text(name.replace("loss/", "")), x, y,
      line: { color: series(place), width: 1.6, dash: DASHES[Math.floor(place / 6 + place) % 6] },
      hovertemplate: "%{fullData.name}, epoch %{x}: %{y:.4g}<extra></extra>",
    }));
    return smskd.row.picture(traces, { title: { text: "loss term" }, type: "log", exponentformat: "power" });
  },

  /** A band between two quantiles: the upper one fills down to the lower one. */
  band(low, high, name, opacity) {
    const { tcp } = smskd.data;
    if (!tcp[low] || !tcp[high]) return [];
    const edge = { type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip", legendgroup: name };
    const fill = smskd.plots.colour("s0") + opacity;
    return [
      { ...edge, x: tcp[low][0], y: tcp[low][1], showlegend: false },
      { ...edge, x: tcp[high][0], y: tcp[high][1], fill: "tonexty", fillcolor: fill, name },
    ];
  },

  tcp() {
    const { tcp, weights } = smskd.data;
    const { series } = smskd.plots;
    const line = (points, name, style) => ({
      type: "scatter", mode: "lines", x: points[0], y: points[1], name, line: style,
      hovertemplate: `${name}, epoch %{x}: %{y:.3f}<extra></extra>`,
    });
    const traces = [
      ...smskd.row.band("tcp/q0.05", "tcp/q0.95", "5 to 95 %", "26"),
      ...smskd.row.band("tcp/q0.25", "tcp/q0.75", "25 to 75 %", "4d"),
    ];
    if (tcp["tcp/mean"]) traces.push(line(tcp["tcp/mean"], "mean", { color: series(0), width: 2 }));
    const weight = weights["reference/mean_weight"];
    if (weight) traces.push(line(weight, "mean weight", { color: series(1), width: 2, dash: "dash" }));
    return smskd.row.picture(traces, { title: { text: "probability, weight" }, rangemode: "tozero" });
  },

  picture(traces, yaxis) {
    const last = smskd.data.stages.at(-1)[3];
    const xaxis = { title: { text: "epoch of the whole sequence" }, range: [0, last * 1.02 + 0.5] };
    return { traces, layout: { xaxis, yaxis, ...smskd.plots.borders(smskd.data.stages) } };
  },
};

smskd.row.start();
