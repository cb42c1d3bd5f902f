"use strict";
// The graph: which elements are seen (the whole in blocks, or one block from inside), and what they are called.
const Graph = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const sites = new Map(data.sites.map((site) => [site.name + "\n" + site.operator, site]));
  const view = { graph: 0, after: true, fold: true, inside: null };

  const renamed = (text, from, to) => (text === from || text.startsWith(from + ".") ? to + text.slice(from.length) : text);
  const spans = (numbers) => {
    const runs = [];
    for (const n of numbers) {
      const last = runs[runs.length - 1];
      if (last && n === last[1] + 1) last[1] = n;
      else runs.push([n, n]);
    }
    return runs.map(([a, b]) => (a === b ? a : a + "…" + b)).join(",");
  };

  function siteOf(step) {
    return step.site ? sites.get(step.site[0] + "\n" + step.site[1]) : undefined;
  }

  function stepsOf(name) {
    // The steps of a block; those of equal blocks are written once, with the first one's names.
    const graph = data.graphs[view.graph];
    const block = graph.blocks.find((b) => b.name === name);
    const run = graph.runs[block.run];
    if (run.name === name) return run.steps;
    return run.steps.map((step) => ({
      ...step,
      module: renamed(step.module, run.name, name),
      parameters: step.parameters.map((p) => renamed(p, run.name, name)),
      site: step.site && [renamed(step.site[0], run.name, name), step.site[1]],
    }));
  }

  function label(step) {
    const site = siteOf(step);
    const short = step.module.split(".").slice(-1)[0];
    const packed = view.after && site && site.format;
    const operator = packed ? (site.operator === "attention" ? "qcompile.sdpa" : site.operator === "embedding" ? "qcompile.rows"
      : "qcompile.linear") + "\n" + site.format : step.operator;
    return (site && short ? short + "\n" : "") + operator;
  }

  function node(step) {
    const site = siteOf(step);
    const kind = site && site.format ? "packed" : site && site.parameter ? "float" : step.operator === "input" ? "input" : "plain";
    return { data: { id: "n:" + step.name, label: label(step), kind: view.after || kind !== "packed" ? kind : "float", step } };
  }

  function groups() {
    // Blocks as they are seen: every run as one while equal blocks are folded.
    const graph = data.graphs[view.graph];
    const seen = [];
    for (const block of graph.blocks) {
      const last = seen[seen.length - 1];
      if (view.fold && last && last.run === block.run) last.names.push(block.name);
      else seen.push({ run: block.run, names: [block.name] });
    }
    return seen;
  }

  function title(group) {
    const numbers = group.names.map((name) => Number(name.split(".").pop()));
    const stem = group.names[0].split(".").slice(0, -1).join(".");
    if (group.names.length === 1) return group.names[0];
    return (stem ? stem + "." : "") + "{" + spans(numbers) + "}\n× " + group.names.length;
  }

  function whole() {
    const graph = data.graphs[view.graph];
    const home = new Map();
    const elements = graph.loose.map(node);
    for (const group of groups()) {
      const id = "b:" + group.names[0];
      group.names.forEach((name) => home.set("b:" + name, id));
      elements.push({ data: { id, label: title(group), kind: "block", block: group.names[0], names: group.names } });
    }
    return elements.concat(edges(graph.edges.map((e) => e.map((id) => home.get(id) || id))));
  }

  function inner() {
    const steps = stepsOf(view.inside);
    const known = new Set(steps.map((s) => s.name));
    const pairs = steps.flatMap((s) => s.inputs.filter((i) => known.has(i)).map((i) => ["n:" + i, "n:" + s.name]));
    return steps.map(node).concat(edges(pairs));
  }

  function edges(pairs) {
    const seen = new Set();
    return pairs.filter(([a, b]) => a !== b && !seen.has(a + "\n" + b) && seen.add(a + "\n" + b))
      .map(([source, target]) => ({ data: { source, target } }));
  }

  function find(words) {
    // Steps and sites whose name, operator, format or line holds all the words; of equal blocks the first while folded.
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const graph = data.graphs[view.graph];
    const hit = (step) => {
      const site = siteOf(step);
      const text = [step.name, step.operator, step.module, step.source, ...step.parameters, site && site.format, site && site.name]
        .join(" ").toLowerCase();
      return wanted.every((w) => text.includes(w));
    };
    const found = graph.loose.filter(hit).map((step) => ({ step, block: null }));
    for (const group of groups()) {
      for (const name of group.names) {
        const hits = stepsOf(name).filter(hit).map((step) => ({ step, block: name }));
        found.push(...hits);
        if (hits.length && found.length > 200) return found;
      }
    }
    return found;
  }

  return { data, view, siteOf, elements: () => (view.inside ? inner() : whole()), find };
})();
