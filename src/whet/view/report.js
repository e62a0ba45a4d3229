"use strict";
for (const svg of document.querySelectorAll("svg.plot")) {
  const axis = (text) => {
    const [offset, factor, log] = text.split(" ").map(Number);
    return (pixel) => (log ? 10 ** (offset + factor * pixel) : offset + factor * pixel);
  };
  const x = axis(svg.dataset.x), y = axis(svg.dataset.y), hair = svg.querySelector(".hair");
  const out = svg.closest("figure").querySelector("output");
  const short = (value) => String(Number(value.toPrecision(4)));
  const lines = [...svg.querySelectorAll("[data-name]")].map((line) => ({
    name: line.dataset.name, path: line.classList.contains("path"),
    points: line.points ? [...line.points].map((one) => [one.x, one.y]) : [[line.cx.baseVal.value, line.cy.baseVal.value]],
  }));
  const near = (line, at) => line.points.reduce((best, one) => {
    const far = line.path ? Math.hypot(one[0] - at.x, one[1] - at.y) : Math.abs(one[0] - at.x);
    return far < best.far ? { far, one } : best;
  }, { far: Infinity, one: null });
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const found = lines.map((line) => ({ line, ...near(line, at) }));
    const shown = lines.some((line) => line.path) ? found.sort((a, b) => a.far - b.far).slice(0, 1) : found;
    if (!shown.length) return;
    const first = shown.reduce((a, b) => (b.far < a.far ? b : a)).one;
    hair.setAttribute("x1", first[0]);
    hair.setAttribute("x2", first[0]);
    hair.style.visibility = "visible";
    out.textContent = `${short(x(first[0]))}: ` + shown.map(({ line, one }) => `${line.name} ${short(y(one[1]))}`).join(", ");
  });
  svg.addEventListener("pointerleave", () => { hair.style.visibility = "hidden"; out.textContent = ""; });
}
