"use strict";
// Adds values under the pointer (or under the arrow keys) to curves and heatmaps; the page is complete without it.
(() => {
  const tip = document.getElementById("tip");

  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - box.width - 16 : x + 16;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, Math.min(innerHeight - box.height - 4, y - box.height / 2)) + "px";
  }

  function hide() { tip.hidden = true; }

  function format(value) {
    const size = Math.abs(value);
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    if (size > 0 && size < 1e-3) return value.toExponential(2);
    return String(Number(value.toPrecision(5)));
  }

  // Index of the step nearest to `step` in an ascending list.
  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  }

  // --- curves: one cross-hair on all charts, so that a step can be read across them ---
  const plots = [...document.querySelectorAll(".plot")].map((element) => {
    const data = JSON.parse(element.querySelector("script").textContent);
    const lines = data.series.filter((series) => !series.style.startsWith("band"));
    const cross = document.createElement("i");
    cross.className = "cross";
    cross.hidden = true;
    element.append(cross);
    const knobs = lines.map((_, index) => {
      const knob = document.createElement("i");
      knob.className = "knob k" + index;
      knob.hidden = true;
      element.append(knob);
      return knob;
    });
    return { element, data, lines, cross, knobs };
  });
  // Charts with most points decide which steps the pointer and the arrow keys stop at.
  const stops = plots.flatMap((plot) => plot.lines.map((series) => series.steps))
    .reduce((longest, steps) => (steps.length > longest.length ? steps : longest), []);

  function mark(step) {
    for (const plot of plots) {
      plot.cross.hidden = false;
      plot.cross.style.left = (step / plot.data.x) * 100 + "%";
      plot.lines.forEach((series, index) => {
        const at = nearest(series.steps, step);
        const value = series.values[at];
        const visible = value !== null && value !== undefined && (!plot.data.log || value > 0);
        plot.knobs[index].hidden = !visible;
        if (!visible) return;
        const scaled = plot.data.log ? Math.log10(value) : value;
        plot.knobs[index].style.left = (series.steps[at] / plot.data.x) * 100 + "%";
        plot.knobs[index].style.top = (1 - (scaled - plot.data.low) / (plot.data.high - plot.data.low)) * 100 + "%";
      });
    }
  }

  function unmark() {
    hide();
    for (const plot of plots) {
      plot.cross.hidden = true;
      for (const knob of plot.knobs) knob.hidden = true;
    }
  }

  function describe(plot, step) {
    const rows = ["step " + step.toLocaleString("en")];
    for (const series of plot.data.series) {
      if (!series.steps.length) continue;
      const at = nearest(series.steps, step);
      const value = series.values[at];
      const elsewhere = series.steps[at] === step ? "" : " (step " + series.steps[at].toLocaleString("en") + ")";
      rows.push(series.name + ": " + (value === null ? "not a number" : format(value)) + elsewhere);
    }
    return rows.join("\n");
  }

  for (const plot of plots) {
    let current = stops.length - 1;
    const visit = (step) => {
      current = nearest(stops, step);
      mark(stops[current]);
      const box = plot.element.getBoundingClientRect();
      show(describe(plot, stops[current]), box.left + (stops[current] / plot.data.x) * box.width, box.top + box.height / 2);
    };
    plot.element.addEventListener("pointermove", (event) => {
      const box = plot.element.getBoundingClientRect();
      visit(((event.clientX - box.left) / box.width) * plot.data.x);
    });
    plot.element.addEventListener("pointerleave", unmark);
    plot.element.addEventListener("blur", unmark);
    plot.element.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -stops.length, End: stops.length }[event.key];
      if (event.key === "Escape") unmark();
      if (!move) return;
      event.preventDefault();
      visit(stops[Math.max(0, Math.min(stops.length - 1, current + move))]);
    });
  }

  // --- heatmaps: the byte of a cell is its place on the colour scale, see launch/heatmap.py ---
  function ratio(position) {
    const place = position / 255;
    if (position === 0) return "0";
    if (position === 255) return "4 or more";
    return (place < 0.5 ? 2 * place : 4 ** (2 * place - 1)).toFixed(2);
  }

  const histories = document.getElementById("histories");
  const columns = histories ? histories.dataset.columns.split(" ") : [];

  for (const frame of document.querySelectorAll(".pixel-frame")) {
    const pixels = frame.querySelector(".pixels");
    const cells = Uint8Array.from(atob(pixels.dataset.positions), (letter) => letter.charCodeAt(0));
    const width = Number(pixels.dataset.columns), height = Number(pixels.dataset.rows);
    const layers = frame.dataset.kind === "matrix" ? frame.dataset.layers.split(",") : [];
    frame.addEventListener("pointermove", (event) => {
      const box = pixels.getBoundingClientRect();
      const column = Math.max(0, Math.min(width - 1, Math.floor(((event.clientX - box.left) / box.width) * width)));
      const row = Math.max(0, Math.min(height - 1, Math.floor(((event.clientY - box.top) / box.height) * height)));
      const where = frame.dataset.kind === "matrix"
        ? "layer " + layers[row] + ", expert " + column
        : "layer " + frame.dataset.layer + ", expert " + row + "\nsteps " + columns[column].replace("-", " to ");
      show(where + "\n" + ratio(cells[row * width + column]) + " × mean load", event.clientX, event.clientY);
    });
    frame.addEventListener("pointerleave", hide);
  }
})();
