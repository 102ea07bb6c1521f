// The chapter's page: shows what chapter_data.js holds, which the package computed.
(() => {
  "use strict";
  const data = window.FCCONV_CHAPTER;
  const root = document.getElementById("chapter");
  if (!data || !root) return;
  const $ = (id) => document.getElementById(`chapter-${id}`);
  const SHARED = ["stride", "padding", "dilation", "groups"];
  let rank = 2;
  let values = {};
  let shown = 0; // number of the output position whose window is drawn

  // ---- the data ------------------------------------------------------------

  function names(of) {
    const axes = [...Array(of).keys()];
    return [
      ...axes.map((axis) => `input${axis}`),
      ...axes.map((axis) => `kernel${axis}`),
      ...SHARED,
    ];
  }

  const kindOf = (name) => name.replace(/\d$/, "");
  const lowest = (name) => (kindOf(name) === "padding" ? 0 : 1);
  const highest = (name) => data.limits[rank][kindOf(name)];

  function place() {
    let number = 0;
    for (const name of names(rank)) {
      const count = highest(name) - lowest(name) + 1;
      number = number * count + (values[name] - lowest(name));
    }
    return number;
  }

  function windowsOf(axis) {
    const key = [values[`input${axis}`], values[`kernel${axis}`],
      values.stride, values.padding, values.dilation].join(",");
    const words = data.windows[key];
    if (words === undefined) return [];
    return words.split(" ").map((word) =>
      [...word].map((letter) => (letter === "." ? null : Number(letter))));
  }

  function quantities() {
    const { stride, padding, dilation, groups } = values;
    const found = { stride, padding, dilation, groups };
    found.offset = Math.floor(padding / stride);
    Object.assign(found, { inputs: 1, taps: 1, outputs: 1 });
    for (let axis = 0; axis < rank; axis++) {
      const size = values[`input${axis}`];
      const kernel = values[`kernel${axis}`];
      const padded = size + 2 * padding;
      const extent = (kernel - 1) * dilation + 1;
      const output = windowsOf(axis).length;
      found[`size${axis}`] = size;
      found[`kernel${axis}`] = kernel;
      found[`output${axis}`] = output;
      found[`unpadded${axis}`] = Math.max(Math.floor((size - extent) / stride) + 1, 0);
      found[`padded${axis}`] = padded;
      found[`extent${axis}`] = extent;
      found[`covered${axis}`] = output * kernel;
      found.inputs *= size;
      found.taps *= kernel;
      found.outputs *= output;
    }
    return found;
  }

  function explanation() {
    const { sentences, which } = data.ranks[rank];
    const start = 2 * place();
    const [pattern, ...slots] = sentences[parseInt(which.slice(start, start + 2), 36)];
    const numbers = quantities();
    const parts = pattern.split("#");
    return parts[0] + slots.map((slot, number) =>
      (typeof slot === "number" ? slot : numbers[slot]) + parts[number + 1]).join("");
  }

  // Taps by output position: [{input, tap}], inputs and taps numbered row by row.
  function reads() {
    const axes = [...Array(rank).keys()].map(windowsOf);
    let positions = [[]];
    axes.forEach((windows, axis) => {
      const size = values[`input${axis}`];
      const kernel = values[`kernel${axis}`];
      positions = positions.length && axis === 0
        ? windows.map((taps) => taps.map((input, tap) => ({ input, tap })))
        : positions.flatMap((before) => windows.map((taps) => before.flatMap((each) =>
          taps.map((input, tap) => ({
            input: each.input === null || input === null
              ? null : each.input * size + input,
            tap: each.tap * kernel + tap,
          })))));
    });
    return positions;
  }

  // Entries of the dense matrix: the number of the kernel's entry, or -1 for zero. One
  // channel a group, so that groups show as blocks.
  function matrix() {
    const groups = values.groups;
    const found = reads();
    const { inputs, taps } = quantities();
    const rows = Array.from({ length: inputs * groups }, () =>
      new Array(found.length * groups).fill(-1));
    found.forEach((window, position) => window.forEach(({ input, tap }) => {
      if (input === null) return;
      for (let group = 0; group < groups; group++) {
        rows[input * groups + group][position * groups + group] = tap + taps * group;
      }
    }));
    return rows;
  }

  // ---- the page ------------------------------------------------------------

  const colour = (entry, entries) =>
    `hsl(${Math.round((entry * 360) / Math.max(entries, 1) + 30) % 360} 70% 72%)`;

  function svg(name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function controls() {
    const box = $("controls");
    box.textContent = "";
    const titles = rank === 2
      ? { input0: "input height", input1: "input width",
        kernel0: "kernel height", kernel1: "kernel width" }
      : { input0: "input size", kernel0: "kernel size" };
    for (const name of names(rank)) {
      const label = document.createElement("label");
      const title = document.createElement("span");
      title.textContent = titles[name] || name;
      const value = document.createElement("output");
      value.textContent = values[name];
      const slider = document.createElement("input");
      Object.assign(slider, {
        type: "range", min: lowest(name), max: highest(name), step: 1,
        value: values[name], name, id: `chapter-${name}`,
      });
      slider.addEventListener("input", () => {
        values[name] = Number(slider.value);
        value.textContent = slider.value;
        shown = 0;
        draw();
      });
      label.append(title, slider, value);
      box.append(label);
    }
    for (const button of root.querySelectorAll("[data-rank]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.rank) === rank));
    }
  }

  function draw() {
    const text = explanation();
    const found = /^case: (\w+)/m.exec(text);
    const verdict = $("verdict");
    $("text").textContent = text;
    if (!found) {
      verdict.dataset.answer = "none";
      verdict.textContent = "No convolution has this geometry.";
    } else {
      const same = text.includes("hold the same parameters");
      verdict.dataset.answer = same ? "yes" : "no";
      verdict.textContent = same
        ? `Yes: ${found[1].replace("_", " ")}. A fully connected layer holds the same parameters.`
        : "No: no fully connected layer holds the same parameters.";
    }
    for (const part of root.querySelectorAll(".needs-geometry")) part.hidden = !found;
    if (found) {
      drawWindows();
      drawMatrix();
    }
    const key = names(rank).map((name) => values[name]).join(",");
    history.replaceState(null, "", `#${rank}d=${key}`);
  }

  function drawWindows() {
    const all = reads();
    const { padding, dilation, stride } = values;
    const size = (axis) => (rank === 2 ? values[`input${axis}`] : axis ? values.input0 : 1);
    const kernel = (axis) => (rank === 2 ? values[`kernel${axis}`] : axis ? values.kernel0 : 1);
    const counts = rank === 2
      ? [windowsOf(0).length, windowsOf(1).length] : [1, windowsOf(0).length];
    const pad = [rank === 2 ? padding : 0, padding];
    const cell = 34;
    const taps = kernel(0) * kernel(1);
    shown = Math.min(shown, all.length - 1);
    const at = [Math.floor(shown / counts[1]), shown % counts[1]];

    const input = $("input");
    input.textContent = "";
    const high = size(0) + 2 * pad[0];
    const wide = size(1) + 2 * pad[1];
    input.setAttribute("viewBox", `-1 -1 ${wide * cell + 2} ${high * cell + 2}`);
    input.style.maxWidth = `${wide * cell + 2}px`;
    const tapAt = new Map();
    for (let y = 0; y < kernel(0); y++) {
      for (let x = 0; x < kernel(1); x++) {
        const row = at[0] * (rank === 2 ? stride : 1) + y * (rank === 2 ? dilation : 1);
        tapAt.set(`${row},${at[1] * stride + x * dilation}`, y * kernel(1) + x);
      }
    }
    for (let y = 0; y < high; y++) {
      for (let x = 0; x < wide; x++) {
        const inside = y >= pad[0] && y < pad[0] + size(0)
          && x >= pad[1] && x < pad[1] + size(1);
        const tap = tapAt.get(`${y},${x}`);
        const box = svg("rect", {
          x: x * cell, y: y * cell, width: cell, height: cell,
          class: inside ? "cell" : "cell padding",
        });
        if (tap !== undefined) box.style.fill = colour(tap, taps);
        input.append(box);
        const number = (y - pad[0]) * size(1) + x - pad[1];
        input.append(svg("text", {
          x: (x + 0.5) * cell, y: (y + 0.5) * cell,
          class: tap === undefined ? "label" : "label read",
        }, inside ? number : ""));
      }
    }

    const output = $("output");
    output.textContent = "";
    output.style.gridTemplateColumns = `repeat(${counts[1]}, minmax(0, 2.1rem))`;
    all.forEach((window, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = number;
      button.tabIndex = number === shown ? 0 : -1;
      button.setAttribute("aria-pressed", String(number === shown));
      const inputs = window.filter((each) => each.input !== null).map((each) => each.input);
      const zeros = window.length - inputs.length;
      const words = `Output ${number} reads ${inputs.length ? `input ${inputs.join(", ")}` : "no input"}`
        + (zeros ? ` and ${zeros} of the padding` : "");
      button.setAttribute("aria-label", words);
      if (number === shown) $("reads").textContent = `${words}.`;
      button.addEventListener("click", () => show(number));
      button.addEventListener("mouseenter", () => show(number));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: counts[1],
          ArrowUp: -counts[1], Home: -number, End: all.length - 1 - number }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        show(Math.min(Math.max(number + step, 0), all.length - 1), true);
      });
      output.append(button);
    });
  }

  function show(number, focus = false) {
    const focused = focus || $("output").contains(document.activeElement);
    if (number !== shown) {
      shown = number;
      drawWindows();
      drawMatrix();
    }
    if (focused) $("output").children[shown].focus();
  }

  function drawMatrix() {
    const rows = matrix();
    const { taps } = quantities();
    const groups = values.groups;
    const columns = rows[0].length;
    const canvas = $("matrix");
    const cell = Math.max(5, Math.min(26, Math.floor((canvas.parentNode.clientWidth - 2) / columns)));
    const sharp = window.devicePixelRatio || 1;
    canvas.width = Math.ceil((columns * cell + 1) * sharp);
    canvas.height = Math.ceil((rows.length * cell + 1) * sharp);
    canvas.style.width = `${columns * cell + 1}px`;
    const pen = canvas.getContext("2d");
    pen.scale(sharp, sharp);
    pen.font = `${Math.floor(cell * 0.42)}px sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    const seen = new Map();
    rows.forEach((row, y) => row.forEach((entry, x) => {
      const mine = Math.floor(x / groups) === shown;
      pen.fillStyle = entry < 0 ? (mine ? "#e9e4d4" : "#fbfbf9") : colour(entry, taps * groups);
      pen.fillRect(x * cell, y * cell, cell, cell);
      pen.strokeStyle = "#b9bdc3";
      pen.lineWidth = 0.5;
      pen.strokeRect(x * cell + 0.5, y * cell + 0.5, cell, cell);
      if (entry >= 0) seen.set(entry, (seen.get(entry) || 0) + 1);
      if (cell >= 16) {
        pen.fillStyle = entry < 0 ? "#8b9097" : "#1b1f23";
        pen.fillText(entry < 0 ? "0" : `w${entry}`, (x + 0.5) * cell, (y + 0.5) * cell);
      }
    }));
    const entries = rows.length * columns;
    const used = [...seen.values()].reduce((sum, count) => sum + count, 0);
    const repeated = [...seen.values()].filter((count) => count > 1).length;
    const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
    const note = `${rows.length} rows (inputs) by ${plural(columns, "column")} (outputs): `
      + `${plural(seen.size, "parameter")} of the kernel in ${plural(used, "place")}, `
      + `${plural(entries - used, "zero")}`
      + (repeated ? `, ${plural(repeated, "parameter")} repeated.` : ", none repeated.");
    $("matrix-note").textContent = note;
    canvas.setAttribute("aria-label", note);
  }

  function choose(newRank, key) {
    rank = newRank;
    values = {};
    names(rank).forEach((name, number) => {
      values[name] = Math.min(Math.max(key[number], lowest(name)), highest(name));
    });
    shown = 0;
    controls();
    draw();
  }

  for (const preset of data.presets) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = preset.name;
    button.addEventListener("click", () => choose(preset.rank, preset.key));
    $("presets").append(button);
  }
  for (const button of root.querySelectorAll("[data-rank]")) {
    button.addEventListener("click", () => {
      const wanted = Number(button.dataset.rank);
      if (wanted === rank) return;
      const shared = SHARED.map((name) => values[name]);
      const { input0, kernel0 } = values;
      choose(wanted, wanted === 2
        ? [input0, input0, kernel0, kernel0, ...shared] : [input0, kernel0, ...shared]);
    });
  }
  const given = /^#([12])d=([\d,]+)$/.exec(location.hash);
  const numbers = given ? given[2].split(",").map(Number) : [];
  if (given && numbers.length === names(Number(given[1])).length) {
    choose(Number(given[1]), numbers);
  } else {
    choose(data.presets[0].rank, data.presets[0].key);
  }
  window.fcconvChapter = { choose, explanation, matrix, reads };
})();
