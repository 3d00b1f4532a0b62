// Colours before the first paint: what was chosen here before, else what the system says.
// The only script that the page waits for; it is small.
(function () {
  "use strict";
  const NAMES = ["auto", "light", "dark"];
  const root = document.documentElement;

  function stored() {
    try {
      return NAMES.includes(localStorage.getItem("smskd-theme")) ? localStorage.getItem("smskd-theme") : "auto";
    } catch {
      return "auto"; // some browsers keep nothing for pages from disk
    }
  }

  function apply(name) {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
    try {
      localStorage.setItem("smskd-theme", name);
    } catch {
      // only this page then
    }
  }

  function label(button, name) {
    const words = name === "auto" ? "as the system says" : name;
    button.setAttribute("aria-label", "Colours: " + words);
    document.getElementById("theme-name").textContent = name;
  }

  root.classList.add("js");
  let current = stored();
  apply(current);
  document.addEventListener("DOMContentLoaded", function () {
    const button = document.getElementById("theme");
    label(button, current);
    button.addEventListener("click", function () {
      current = NAMES[(NAMES.indexOf(current) + 1) % NAMES.length];
      apply(current);
      label(button, current);
      document.dispatchEvent(new Event("smskd-theme"));
    });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () {
    document.dispatchEvent(new Event("smskd-theme"));
  });
})();
