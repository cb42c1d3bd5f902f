"use strict";
// The page around the graph: drawing, details, search, plots, tables.
(() => {
  const { data, view } = Graph;
  const at = (id) => document.getElementById(id);
  const make = (tag, text, parent) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const size = (bytes) => {
    const unit = ["B", "kB", "MB", "GB", "TB"];
    let i = 0;
    for (; bytes >= 999.5 && i < 4; i += 1) bytes /= 1000;
    return (i ? bytes.toPrecision(3) : bytes) + " " + unit[i];
  };

  const COLORS = { packed: "#2a78b8", float: "#b86a2a", block: "#5d6d7e", input: "#3f8f5f", plain: "#e6e9ec" };
  const style = [
    { selector: "node", style: { label: "data(label)", "text-wrap": "wrap", "text-valign": "center", "font-size": 11, shape: "round-rectangle",
      width: "label", height: "label", padding: 7, color: "#fff", "background-color": (n) => COLORS[n.data("kind")] } },
    { selector: "node[kind = 'plain']", style: { color: "#222" } },
    { selector: "node[kind = 'block']", style: { "border-width": 3, "border-color": "#2c3e50", padding: 12 } },
    { selector: "node:selected", style: { "border-width": 4, "border-color": "#d4b106" } },
    { selector: "edge", style: { width: 1.4, "line-color": "#aab", "target-arrow-color": "#aab", "target-arrow-shape": "triangle",
      "curve-style": "straight", "arrow-scale": 0.8 } },
  ];
  let cy = null;

  function draw(select) {
    if (cy) cy.destroy();
    const elements = data.graphs.length ? Graph.elements() : [];
    cy = cytoscape({ container: at("graph"), elements, style, wheelSensitivity: 0.3, minZoom: 0.02, maxZoom: 4,
      layout: { name: elements.length > 3000 ? "grid" : "dagre", rankDir: "TB", nodeSep: 14, rankSep: 26 } });
    cy.on("tap", "node", (event) => (event.target.data("kind") === "block" ? enter(event.target.data("block"), event.target.data("names"))
      : show(event.target.data("step"))));
    at("up").disabled = !view.inside;
    at("where").textContent = view.inside || "";
    if (!select) {
      top();
      return;
    }
    const node = cy.getElementById("n:" + select.name);
    cy.zoom(1);
    cy.center(node);
    node.select();
    show(select);
  }

  function top() {
    // A graph too large to be read whole is shown readable around its first block, or from its beginning.
    if (!cy.nodes().length) return;
    cy.fit(undefined, 20);
    if (cy.zoom() >= 0.6) return;
    const box = cy.nodes().boundingBox();
    const block = cy.nodes("[kind = 'block']");
    cy.zoom(0.8);
    if (block.length) cy.center(block[0]);
    else cy.pan({ x: cy.width() / 2 - (0.8 * (box.x1 + box.x2)) / 2, y: 20 - 0.8 * box.y1 });
  }

  function enter(name, names) {
    view.inside = name;
    draw();
    const box = at("details");
    box.replaceChildren();
    make("h3", names && names.length > 1 ? names.length + " equal blocks; this is " + name : name, box);
  }

  function field(table, name, text) {
    if (text === null || text === undefined || text === "") return;
    const row = make("tr", undefined, table);
    make("th", name, row);
    make("td", text, row);
  }

  function show(step) {
    const site = Graph.siteOf(step);
    const box = at("details");
    box.replaceChildren();
    make("h3", (site && site.name) || step.module || step.name, box);
    const table = make("table", undefined, box);
    field(table, "operator", step.operator);
    field(table, "node", step.name);
    field(table, "value", step.shape.length || step.dtype ? "[" + step.shape.join(", ") + "] " + step.dtype : "");
    field(table, "parameters", step.parameters.join(", "));
    if (site) {
      field(table, "weight", site.shape.join("×") + " " + site.dtype);
      field(table, "roles", site.roles.join(", "));
      field(table, "format", site.format || "left in " + site.dtype);
      field(table, "kernel", site.kernel);
      field(table, "rule", site.rule);
      field(table, "left because", site.reason);
      field(table, "bytes", site.parameter ? size(site.before) + (site.format ? " → " + size(site.after) : "") : "");
      field(table, "FLOP", site.flops ? site.flops.toLocaleString("en") : "");
      field(table, "SQNR", site.sqnr === null ? "" : site.sqnr + " dB");
      if (site.format && data.kernels[site.format]) {
        const link = make("a", "source of the kernel", make("p", undefined, box));
        link.href = "#kernel-" + site.format;
        link.onclick = () => { at("kernel-" + site.format).open = true; };
      }
    }
    if (step.source) {
      make("p", step.source, box).className = "source";
      make("pre", (data.sources[step.source] || []).join("\n"), box);
    }
  }

  function search() {
    const list = at("results");
    list.replaceChildren();
    const words = at("search").value.trim();
    if (!words) return;
    for (const { step, block } of Graph.find(words).slice(0, 60)) {
      const site = Graph.siteOf(step);
      const button = make("button", (site ? site.name : step.module || step.name) + " · " + step.operator, make("li", undefined, list));
      button.onclick = () => { view.inside = block; draw(step); };
    }
    if (!list.children.length) make("li", "nothing found", list);
  }

  function toolbar() {
    data.graphs.forEach((graph, i) => { make("option", graph.name, at("which")).value = i; });
    at("which").hidden = data.graphs.length < 2;
    at("which").onchange = () => { view.graph = Number(at("which").value); view.inside = null; draw(); };
    const phase = (after) => () => {
      view.after = after;
      at("after").classList.toggle("on", after);
      at("before").classList.toggle("on", !after);
      draw();
    };
    at("before").onclick = phase(false);
    at("after").onclick = phase(true);
    at("fold").onchange = () => { view.fold = at("fold").checked; view.inside = null; draw(); };
    at("up").onclick = () => { view.inside = null; draw(); };
    at("fit").onclick = () => cy.fit(undefined, 20);
    at("search").oninput = search;
  }

  function plots() {
    const weights = data.sites.filter((s) => s.parameter);
    const options = (unit) => ({ animation: false, maintainAspectRatio: false, scales: { x: { ticks: { maxRotation: 60, autoSkip: true } },
      y: { title: { display: true, text: unit } } } });
    new Chart(at("bytes"), { type: "bar", options: options("bytes"), data: { labels: weights.map((s) => s.name), datasets: [
      { label: "before", data: weights.map((s) => s.before), backgroundColor: COLORS.float },
      { label: "after", data: weights.map((s) => s.after), backgroundColor: COLORS.packed }] } });
    const compared = data.comparison;
    const measured = weights.filter((s) => s.sqnr !== null);
    if (compared) {
      at("error-title").textContent = "Error by layer: relative, of the model's output";
      at("advice").textContent = data.advice ? "Suggestion: " + data.advice : "";
      const names = compared.errors.map((e) => e.name.replace(/\.weight$/, ""));
      new Chart(at("errors"), { type: "bar", options: options("relative error"), data: { labels: names, datasets: [
        { label: "alone", data: compared.errors.map((e) => e.alone), backgroundColor: COLORS.float },
        { label: "accumulated up to it", data: compared.errors.map((e) => e.accumulated), backgroundColor: COLORS.block }] } });
    } else if (measured.length) {
      at("error-title").textContent = "Error by layer: signal to quantization noise of the weight";
      new Chart(at("errors"), { type: "bar", options: options("dB"), data: { labels: measured.map((s) => s.name),
        datasets: [{ label: "SQNR", data: measured.map((s) => s.sqnr), backgroundColor: COLORS.packed }] } });
    } else {
      at("error-title").textContent = "Error by layer: not measured (weights without values)";
    }
  }

  function searched() {
    // The front of a search, formats used for all layers, the choice, and the choice layer by layer.
    const found = data.search;
    if (!found) return;
    at("search-section").hidden = false;
    at("search-summary").textContent = found.summary.join("\n");
    const points = (list, y) => list.filter((p) => p[y] > 0).map((p) => ({ x: p.bits, y: p[y], label: p.label }));
    const named = Object.entries(found.uniform).map(([label, p]) => ({ ...p, label }));
    const chosen = [{ ...found.chosen, label: found.budget }];
    new Chart(at("front"), { type: "scatter", data: { datasets: [
      { label: "best choice of formats, predicted", data: points(found.front, "predicted"), showLine: true, borderColor: COLORS.packed,
        backgroundColor: COLORS.packed },
      { label: "one format for all layers, predicted", data: points(named, "predicted"), backgroundColor: COLORS.block, pointRadius: 5 },
      { label: "the choice, predicted", data: points(chosen, "predicted"), backgroundColor: COLORS.float, pointStyle: "star",
        borderColor: COLORS.float, pointRadius: 10 },
      { label: "the choice, measured", data: points(chosen, "measured"), pointStyle: "crossRot", borderColor: COLORS.float,
        pointRadius: 7 }] },
      options: { animation: false, maintainAspectRatio: false, scales: {
        x: { title: { display: true, text: "bits per weight, scales included" } },
        y: { type: "logarithmic", title: { display: true, text: found.measure } } },
      plugins: { tooltip: { callbacks: { label: (item) => (item.raw.label ? item.raw.label + ": " : "") + item.raw.x.toFixed(3)
        + " bits, " + item.raw.y.toExponential(2) } } } } });
    const table = at("choices");
    ["layer", "format", "bits", "bytes", "loss alone"].forEach((name) => make("th", name, table.querySelector("thead tr")));
    for (const choice of found.choices) {
      const line = make("tr", undefined, table.querySelector("tbody"));
      const cells = [choice.layer, choice.format, choice.bits.toFixed(3), size(choice.nbytes), choice.loss.toExponential(2)];
      cells.forEach((text, i) => { const cell = make("td", text, line); if (i > 1) cell.className = "number"; });
    }
  }

  function tables() {
    const columns = ["layer", "×", "operator", "shape", "format", "kernel", "rule", "bytes", "SQNR", "left because"];
    const numbers = new Set([1, 3, 7, 8]);
    const head = at("decisions").querySelector("thead tr");
    columns.forEach((name) => make("th", name, head));
    const body = at("decisions").querySelector("tbody");
    for (const row of data.rows) {
      const line = make("tr", undefined, body);
      if (row[9]) line.className = "left";
      row.forEach((text, i) => { if (numbers.has(i)) make("td", text, line).className = "number"; else make("td", text, line); });
    }
    const filter = () => {
      const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const line of body.rows) {
        const text = line.textContent.toLowerCase();
        line.hidden = !words.every((w) => text.includes(w));
        shown += line.hidden ? 0 : 1;
      }
      at("shown").textContent = shown + " of " + body.rows.length + " rows";
    };
    at("filter").oninput = filter;
    filter();
    const folded = (name, text, parent) => {
      const box = make("details", undefined, parent);
      make("summary", name + ", " + size(text.length), box);
      const body = make("div", undefined, box);
      box.addEventListener("toggle", () => { if (box.open && !body.children.length) make("pre", text, body); });
      return box;
    };
    for (const [name, text] of Object.entries(data.kernels)) {
      const box = folded(name, text, at("kernels"));
      box.id = "kernel-" + name;
      for (const [kernel, code] of Object.entries(data.code[name] || {})) folded(kernel, code, box).className = "code";
    }
  }

  at("summary").textContent = data.summary.join("\n");
  at("versions").textContent = data.versions;
  toolbar();
  draw();
  plots();
  searched();
  tables();
  window.qcompile = { ready: performance.now(), graph: () => cy };
})();
