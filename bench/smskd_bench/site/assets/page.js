// What all scripts share: one name, the page's data, and a way to be handed more of it.
"use strict";

const smskd = {
  /** The page's own data. */
  data: JSON.parse(document.getElementById("data").textContent),
  /** Where this script lies, so that pages in folders find the others. */
  assets: document.currentScript.src.replace(/[^/]*$/, ""),
  waiting: [],

  /** A data file of the site calls this; a page from disk may not fetch. */
  receive(value) {
    smskd.waiting.splice(0).forEach((done) => done(value));
  },

  /** Load a script of the site once. */
  script(address) {
    smskd.loaded ??= new Map();
    if (!smskd.loaded.has(address)) {
      smskd.loaded.set(
        address,
        new Promise((done, failed) => {
          const element = document.createElement("script");
          element.src = address;
          element.onload = done;
          element.onerror = () => failed(new Error("cannot load " + address));
          document.head.append(element);
        }),
      );
    }
    return smskd.loaded.get(address);
  },

  /** Load a data file, which calls receive(). */
  dataFile(address) {
    const value = new Promise((done) => smskd.waiting.push(done));
    return smskd.script(address).then(() => value);
  },
};
