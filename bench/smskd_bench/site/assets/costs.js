// Accuracy against parameters, MACs, latency, size or energy, with the Pareto front.
"use strict";

smskd.costs = {
  AXES: {
    params: { title: "parameters of the student", measured: false },
    macs: { title: "multiply-accumulates of one image", measured: false },
    ms: { title: "median latency of one image, ms", measured: true },
    mb: { title: "size of the exported graph, MB", measured: true },
    mj: { title: "energy of one image, mJ", measured: true },
  },

  start() {
    const axis = document.getElementById("axis");
    const target = document.getElementById("target");
    smskd.data.costs.places.forEach((place) => target.append(new Option(place, place)));
    axis.addEventListener("change", () => smskd.view.set({ axis: axis.value }));
    target.addEventListener("change", () => smskd.view.set({ target: target.value }));
    smskd.costs.update();
  },

  /** The chosen axis, if the board has it. */
  axis() {
    const select = document.getElementById("axis");
    const known = [...select.options].map((option) => option.value);
    const wanted = smskd.view.state.axis;
    select.value = known.includes(wanted) ? wanted : smskd.costs.telling(known);
    return select.value;
  },

  /** Without a choice: latency where students do not differ in parameters, else parameters. */
  telling(known) {
    const sizes = new Set(smskd.data.rows.map((row) => row.params));
    return sizes.size < 2 && known.includes("ms") ? "ms" : known[0];
  },

  place() {
    const places = smskd.data.costs.places;
    const wanted = places.indexOf(smskd.view.state.target);
    const place = wanted < 0 ? 0 : wanted;
    if (places.length) document.getElementById("target").value = places[place];
    return place;
  },

  /** What is drawn: of the rows that the filters leave. */
  points(axis) {
    const rows = smskd.data.rows;
    const left = new Set(smskd.table.shown);
    if (!smskd.costs.AXES[axis].measured) {
      return [...left].map((i) => smskd.costs.point(i, rows[i][axis], rows[i].top1, ""));
    }
    const place = smskd.costs.place();
    return smskd.data.costs.points
      .filter((p) => p.place === place && left.has(p.row))
      .map((p) => smskd.costs.point(p.row, p[axis], p.top1, p.label));
  },

  point(index, x, y, label) {
    return { index, x, y, name: smskd.data.rows[index].name, label };
  },

  /** Marks the points that no other beats in one and equals in the other. */
  front(points) {
    let best = -Infinity;
    const sorted = [...points].sort((a, b) => a.x - b.x || b.y - a.y);
    return sorted.filter((point) => {
      const better = point.y > best;
      if (better) best = point.y;
      return better;
    });
  },

  update() {
    const axis = smskd.costs.axis();
    const measured = smskd.costs.AXES[axis].measured;
    document.getElementById("target-label").hidden = !measured;
    const points = smskd.costs.points(axis).filter((p) => p.x !== null && p.y !== null && p.x > 0);
    const front = smskd.costs.front(points);
    smskd.costs.say(points, front);
    smskd.plots.draw(document.getElementById("cost-plot"), () => smskd.costs.make(axis, points, front));
  },

  /** The front in words, for those who do not see the picture. */
  say(points, front) {
    const named = front.slice(0, 8).map((p) => `${p.name}${p.label ? " " + p.label : ""} (${p.y.toFixed(2)} %)`);
    const more = front.length > 8 ? ` and ${front.length - 8} more` : "";
    const alike = points.length > 1 && points.every((p) => p.x === points[0].x);
    document.getElementById("front").textContent = alike
      ? "All of these cost the same here."
      : points.length
      ? `Front, cheapest first: ${named.join(", ")}${more}.`
      : "Nothing to draw here: no row that is shown was measured so.";
  },

  make(axis, points, front) {
    // Annotations on a logarithmic axis are placed by the exponent.
    const { series, text, short, colour } = smskd.plots;
    const pairs = [...new Set(points.map((p) => smskd.data.rows[p.index].pair))];
    const several = pairs.length > 1;
    const traces = pairs.map((pair, place) => {
      const own = points.filter((p) => smskd.data.rows[p.index].pair === pair);
      return {
        type: "scatter", mode: "markers", name: short(smskd.data.pairs[pair], 44), showlegend: several,
        x: own.map((p) => p.x), y: own.map((p) => p.y),
        text: own.map((p) => text(p.label ? `${p.name}, ${p.label}` : p.name)),
        marker: {
          color: series(place), size: 9, opacity: 0.85,
          symbol: smskd.plots.SYMBOLS[Math.floor(place / 6) % 6],
          line: { color: colour("page"), width: 1 },
        },
        hovertemplate: "%{text}<br>%{x:.4g}, top-1 %{y:.2f} %<extra></extra>",
      };
    });
    traces.unshift({
      type: "scatter", mode: "lines", name: "Pareto front", showlegend: several, hoverinfo: "skip",
      x: front.map((p) => p.x), y: front.map((p) => p.y),
      line: { shape: "hv", color: colour("quiet"), width: 1.5 },
    });
    const labels = front.slice(-6).map((p) => ({
      x: Math.log10(p.x), y: p.y, xanchor: "left", yanchor: "bottom", showarrow: false,
      text: short(p.label ? `${p.name} ${p.label}` : p.name, 30), font: { size: 12, color: colour("quiet") },
    }));
    const title = smskd.costs.AXES[axis].title;
    return {
      traces,
      layout: {
        xaxis: { title: { text: title }, ...smskd.plots.logAxis(points.map((p) => p.x)) },
        yaxis: { title: { text: "top-1, %" } },
        annotations: labels,
      },
    };
  },
};
