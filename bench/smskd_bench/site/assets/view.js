// The view of the board: filters, order and picture, as the part of the address after #.
"use strict";

smskd.view = {
  /** What an address may say, with what holds where it does not. */
  defaults: { pair: "", method: "", verdict: "", q: "", sort: "", axis: "", target: "" },
  state: {},
  listeners: [],

  /** Whether the address holds a view; else it is a place on the page. */
  isView(hash) {
    return hash === "" || hash.includes("=");
  },

  read() {
    const { defaults, isView } = smskd.view;
    const hash = location.hash.slice(1);
    if (!isView(hash)) return false;
    const words = new URLSearchParams(hash);
    smskd.view.state = { ...defaults };
    for (const name of Object.keys(defaults)) {
      if (words.has(name)) smskd.view.state[name] = words.get(name);
    }
    return true;
  },

  write() {
    const { defaults, state } = smskd.view;
    const words = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) {
      if (value !== defaults[name]) words.set(name, value);
    }
    const hash = words.toString();
    if (hash === location.hash.slice(1)) return;
    // Without the hash the address is the page's own, and "#" alone would jump to the top.
    history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  },

  /** Change some of it, and tell everybody. */
  set(changes) {
    Object.assign(smskd.view.state, changes);
    smskd.view.write();
    smskd.view.tell(Object.keys(changes));
  },

  tell(changed) {
    smskd.view.listeners.forEach((call) => call(changed));
  },

  start() {
    smskd.view.state = { ...smskd.view.defaults };
    smskd.view.read();
    addEventListener("hashchange", () => {
      if (smskd.view.read()) smskd.view.tell(Object.keys(smskd.view.defaults));
    });
  },
};
