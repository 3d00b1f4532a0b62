// One pair's maps at a time.
"use strict";

smskd.heat = {
  start() {
    const select = document.getElementById("heat-pair");
    if (!select) return;
    const maps = [...document.querySelectorAll("#maps .map")];
    [...new Set(maps.map((map) => map.dataset.pair))].forEach((pair) => select.append(new Option(pair, pair)));
    const show = () => maps.forEach((map) => (map.hidden = map.dataset.pair !== select.value));
    select.addEventListener("change", show);
    show();
  },
};
