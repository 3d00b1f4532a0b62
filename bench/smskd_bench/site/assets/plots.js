// Drawing with Plotly, which is loaded when the first picture comes into view; colours of the theme.
"use strict";

smskd.plots = {
  DASHES: ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"],
  SYMBOLS: ["circle", "square", "diamond", "triangle-up", "cross", "star"],

  /** A colour of the style sheet. */
  colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  },

  series(place) {
    return smskd.plots.colour("s" + (place % 6));
  },

  /** Plotly reads some HTML in texts; names are text. */
  text(name) {
    return name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  },

  short(name, most = 40) {
    return smskd.plots.text(name.length > most ? name.slice(0, most - 3) + "..." : name);
  },

  /**
   * Draw now if the picture is seen, else when it comes into view: drawing 2,000 points takes longer
   * than filtering them, and must not be in the way of whoever filters further up.
   */
  draw(element, make) {
    element.smskdMake = make;
    element.smskdStale = true;
    if (element.smskdSeen) smskd.plots.redraw(element);
    else if (element.smskdSeen === undefined) smskd.plots.watch(element);
  },

  watch(element) {
    element.smskdSeen = false;
    const look = (entries) => {
      element.smskdSeen = entries.at(-1).isIntersecting;
      if (element.smskdSeen && element.smskdStale) smskd.plots.redraw(element);
    };
    new IntersectionObserver(look, { rootMargin: "100px" }).observe(element);
    document.addEventListener("smskd-theme", () => smskd.plots.draw(element, element.smskdMake));
  },

  async redraw(element) {
    element.smskdStale = false;
    await smskd.script(smskd.assets + "plotly.min.js");
    const made = await element.smskdMake();
    const layout = smskd.plots.layout(made, element.clientWidth);
    // The legend has room of its own, so that many names do not leave the picture flat.
    element.smskdHeight ??= element.clientHeight;
    element.style.height = `${element.smskdHeight + layout.legend.maxheight}px`;
    await Plotly.react(element, made.traces, layout, { displayModeBar: false, responsive: true });
    element.dataset.drawn = String(made.traces.length);
  },

  layout({ traces, layout }, width) {
    const { colour } = smskd.plots;
    const [line, font] = [colour("line"), { size: 12, color: colour("quiet") }];
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: font };
    const legend = smskd.plots.legendHeight(traces, width);
    const titled = (own) => ({ ...axis, ...own, title: { font, standoff: 8, ...own.title } });
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("text") },
      margin: { l: 56, r: 16, t: 30, b: 48 + legend },
      hoverlabel: { bgcolor: colour("raised"), bordercolor: line, font: { color: colour("text") } },
      legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0.01, yanchor: "bottom", maxheight: legend + 8 },
      xaxis: titled(layout.xaxis),
      yaxis: titled(layout.yaxis),
    };
  },

  /** Room below for the legend's lines, as Plotly breaks them: columns as wide as the longest. */
  legendHeight(traces, width) {
    const named = traces.filter((trace) => trace.showlegend !== false && trace.name);
    if (named.length < 2) return 2;
    const widest = Math.max(...named.map((trace) => 52 + 6.6 * trace.name.length));
    const columns = Math.max(1, Math.floor((width - 72) / widest));
    return 22 * Math.ceil(named.length / columns) + 8;
  },

  /** Ends of an axis of accuracies: from the lowest that matters, so that the ends can be told. */
  accuracyRange(traces, from) {
    const late = traces.flatMap((t) => t.y.filter((y, i) => y !== null && t.x[i] >= from));
    if (!late.length) return {};
    const [low, high] = [Math.min(...late), Math.max(...late)];
    const room = Math.max(0.5, 0.06 * (high - low));
    return { range: [Math.max(-1, low - room), Math.min(101, high + room)] };
  },

  /** A logarithmic axis with few round ticks: 1, 2 and 5 times powers of ten, or only powers. */
  logAxis(values) {
    const known = values.filter((value) => value > 0);
    if (!known.length) return { type: "log" };
    const [low, high] = [Math.log10(Math.min(...known)), Math.log10(Math.max(...known))];
    const room = Math.max(0.08, 0.06 * (high - low));
    const steps = high - low > 2 ? [1] : high - low > 0.4 ? [1, 2, 5] : [1, 1.2, 1.5, 2, 3, 4, 5, 6, 8];
    const ticks = [];
    for (let power = Math.floor(low) - 1; power <= high + 1; power++) {
      steps.forEach((step) => ticks.push(Number((step * 10 ** power).toPrecision(3))));
    }
    const range = [low - room, high + room];
    const tickvals = ticks.filter((t) => Math.log10(t) >= range[0] && Math.log10(t) <= range[1]);
    return { type: "log", range, tickvals, ticktext: tickvals.map(smskd.plots.brief) };
  },

  /** A number with a prefix of its size: 5k, 12M, 0.02. */
  brief(value) {
    for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (value >= size) return Number((value / size).toPrecision(3)) + unit;
    }
    return value >= 1e-3 ? String(value) : value.toExponential(0).replace("e-", "e\u2212");
  },

  /** Dotted lines where stages end, with their names. */
  borders(stages) {
    const { colour, short } = smskd.plots;
    const shapes = stages.slice(0, -1).map(([, , , end]) => ({
      type: "line", xref: "x", yref: "paper", x0: end + 0.5, x1: end + 0.5, y0: 0, y1: 1,
      line: { color: colour("quiet"), width: 1, dash: "dot" },
    }));
    const annotations = stages.map(([number, title, start, end]) => ({
      xref: "x", yref: "paper", x: (start + end) / 2 + 0.5, y: 1, yanchor: "bottom", showarrow: false,
      text: short(`${number}. ${title}`, 22), font: { size: 12, color: colour("quiet") },
    }));
    return { shapes, annotations };
  },
};
