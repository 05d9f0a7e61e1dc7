"use strict";
(() => {
  const root = document.documentElement, theme = document.getElementById("theme"), form = document.getElementById("filter");
  const CHUNK = 300;

  // The choice is kept where the browser lets a page keep it.
  const stored = { get: () => { try { return localStorage.getItem("dct-theme"); } catch { return null; } },
                   set: value => { try { localStorage.setItem("dct-theme", value); } catch { /* not kept */ } } };
  const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const showTheme = () => { theme.setAttribute("aria-pressed", isDark()); };
  if (stored.get()) root.dataset.theme = stored.get();
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; stored.set(root.dataset.theme); showTheme(); });
  showTheme();

  const filter = () => {
    const { kind, decision, scale } = form.elements;
    const fits = element => [[kind, "kind"], [decision, "decision"]].every(
      ([choice, key]) => !choice.value || element.dataset[key].split(" ").includes(choice.value));
    const rows = [...document.querySelectorAll(".sites tbody tr")];
    for (const element of [...rows, ...document.querySelectorAll(".region")]) element.hidden = !fits(element);
    const shown = rows.filter(row => !row.hidden).length;
    document.getElementById("shown").textContent = shown === rows.length ? `${shown} sites` : `${shown} of ${rows.length} sites`;
    document.querySelector(".sites").classList.toggle("linear", scale.value === "linear");
  };
  if (form) { form.addEventListener("input", filter); filter(); }
  // A link to what the filter hides shows everything again.
  addEventListener("hashchange", () => {
    const target = document.getElementById(location.hash.slice(1));
    if (form && target?.closest("[hidden]")) { form.reset(); filter(); target.scrollIntoView(); }
  });

  const collapsed = new Map();
  const nodesOf = graph => {
    if (!collapsed.has(graph)) collapsed.set(graph, JSON.parse(document.getElementById(`collapsed-${graph}`).textContent));
    return collapsed.get(graph);
  };
  const make = (tag, className, ...content) => {
    const element = document.createElement(tag);
    element.className = className;
    element.append(...content);
    return element;
  };
  const nodeOf = ([name, operator, inputs, result, place, anchor]) => {
    const meta = make("span", "meta", ` ${result} `);
    if (anchor) { const link = make("a", "src", place); link.href = `#${anchor}`; meta.append(link); }
    return make("div", "n kept", make("b", "", name), ` = ${operator}(${inputs}) `, meta);
  };
  const expand = button => {
    const { graph, start, count } = button.dataset, from = Number(start), total = Number(count), shown = Math.min(CHUNK, total);
    const rows = make("div", "rows");
    for (const node of nodesOf(graph).slice(from, from + shown)) rows.append(make("div", "row", make("div", "side", nodeOf(node)), make("div", "side twin", nodeOf(node))));
    button.parentElement.before(rows);
    if (shown === total) { button.parentElement.remove(); return; }
    button.dataset.start = from + shown;
    button.dataset.count = total - shown;
    button.textContent = `${total - shown} more nodes that stay as they are`;
  };
  const mark = canvas => {
    const hidden = canvas.scrollWidth - canvas.clientWidth, from = canvas.scrollLeft;
    canvas.classList.toggle("more-left", from > 1);
    canvas.classList.toggle("more-right", from < hidden - 1);
    canvas.previousElementSibling.hidden = hidden <= 1;
  };
  // In the next frame: the hint changes the layout.
  const sizes = new ResizeObserver(entries => requestAnimationFrame(() => { for (const entry of entries) mark(entry.target); }));
  for (const canvas of document.querySelectorAll(".canvas")) { sizes.observe(canvas); canvas.addEventListener("scroll", () => mark(canvas)); }
  document.addEventListener("click", event => { if (event.target.matches(".gap button")) expand(event.target); });
})();
