// Drawing with Plotly, which is loaded when the first picture comes near; colours of the theme.
"use strict";

smskd.plots = {
  DASHES: ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"],
  SYMBOLS: ["circle", "square", "diamond", "triangle-up", "cross", "star"],
  redraws: [],

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

  /** Draw now if the picture is near, else when it comes near; again when the theme changes. */
  draw(element, make) {
    const first = !element.smskdMake;
    element.smskdMake = make;
    if (first) smskd.whenNear(element, () => smskd.plots.begin(element));
    else if (element.smskdNear) smskd.plots.redraw(element);
  },

  begin(element) {
    element.smskdNear = true;
    document.addEventListener("smskd-theme", () => smskd.plots.redraw(element));
    smskd.plots.redraw(element);
  },

  async redraw(element) {
    await smskd.script(smskd.assets + "plotly.min.js");
    const made = await element.smskdMake();
    const narrow = element.clientWidth < 560;
    const layout = smskd.plots.layout(made.layout, narrow);
    await Plotly.react(element, made.traces, layout, { displayModeBar: false, responsive: true });
    element.dataset.drawn = String(made.traces.length);
  },

  layout(own, narrow) {
    const { colour } = smskd.plots;
    const line = colour("line");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    return {
      ...own,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: colour("text") },
      margin: { l: 52, r: 12, t: 28, b: 44 },
      hoverlabel: { bgcolor: colour("raised"), bordercolor: line, font: { color: colour("text") } },
      legend: { orientation: "h", y: narrow ? -0.28 : -0.2, yanchor: "top", x: 0 },
      xaxis: { ...axis, ...own.xaxis },
      yaxis: { ...axis, ...own.yaxis },
    };
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
