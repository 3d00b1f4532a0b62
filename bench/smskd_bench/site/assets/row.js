// The pictures of one row: curves of each seed, loss terms, TCP and weights.
"use strict";

smskd.row = {
  METRICS: { train_top1: "top-1, %", loss: "loss, sum of all terms", lr: "learning rate" },

  start() {
    const { seeds, terms, tcp, weights } = smskd.data;
    if (!seeds.length) return;
    const metric = document.getElementById("metric");
    metric.addEventListener("change", smskd.row.curves);
    smskd.row.curves();
    if (Object.keys(terms).length) smskd.row.draw("terms-plot", smskd.row.terms);
    if (Object.keys(tcp).length) smskd.row.draw("tcp-plot", smskd.row.tcp);
    if (weights["reference/mean_weight"]) smskd.row.draw("weights-plot", smskd.row.weights);
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
    const { accuracyRange, logAxis } = smskd.plots;
    const from = smskd.data.stages[0][3] / 2;
    const axis = metric === "train_top1" ? accuracyRange(traces, from) : logAxis(traces.flatMap((t) => t.y));
    return smskd.row.picture(traces, { title: { text: smskd.row.METRICS[metric] }, ...axis });
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
    const axis = smskd.plots.logAxis(traces.flatMap((trace) => trace.y));
    return smskd.row.picture(traces, { title: { text: "loss term" }, ...axis });
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
    const { tcp } = smskd.data;
    const traces = [
      ...smskd.row.band("tcp/q0.05", "tcp/q0.95", "5 to 95 %", "26"),
      ...smskd.row.band("tcp/q0.25", "tcp/q0.75", "25 to 75 %", "4d"),
    ];
    if (tcp["tcp/mean"]) traces.push(smskd.row.mean(tcp["tcp/mean"], "mean", 0));
    return smskd.row.picture(traces, { title: { text: "probability of the true class" } });
  },

  weights() {
    const traces = [smskd.row.mean(smskd.data.weights["reference/mean_weight"], "mean weight", 1)];
    return smskd.row.picture(traces, { title: { text: "mean weight" }, rangemode: "tozero" });
  },

  mean([x, y], name, place) {
    const hovertemplate = `${name}, epoch %{x}: %{y:.4g}<extra></extra>`;
    const line = { color: smskd.plots.series(place), width: 2 };
    return { type: "scatter", mode: "lines", x, y, name, line, hovertemplate };
  },

  picture(traces, yaxis) {
    const last = smskd.data.stages.at(-1)[3];
    const xaxis = { title: { text: "epoch of the whole sequence" }, range: [0, last * 1.02 + 0.5] };
    return { traces, layout: { xaxis, yaxis, ...smskd.plots.borders(smskd.data.stages) } };
  },
};

smskd.row.start();
