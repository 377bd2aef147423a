// Shows the values of a curve under the pointer. The page says everything without it; it reads our own drawings only.
"use strict";
const numbers = (text) => text.split(" ").map(Number);
const said = (value) => (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(+value.toPrecision(4)) : value.toExponential(2));
const points = (group) =>
  Array.from(group.querySelectorAll("path"), (path) => path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(",").map(Number))).flat();

for (const chart of document.querySelectorAll("svg.curve[data-box]")) {
  const [left, top, right, bottom] = numbers(chart.dataset.box);
  const [first, last] = numbers(chart.dataset.x);
  const [low, high] = numbers(chart.dataset.y);
  const lines = Array.from(chart.querySelectorAll("g[data-name]"), (group) => ({ name: group.dataset.name, points: points(group) }));
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  const readout = document.createElement("p");
  readout.className = "readout";
  readout.setAttribute("aria-hidden", "true");
  chart.after(readout);
  chart.addEventListener("pointermove", (event) => {
    const frame = chart.getBoundingClientRect();
    const x = Math.min(right, Math.max(left, ((event.clientX - frame.left) / frame.width) * chart.viewBox.baseVal.width));
    const near = lines.filter((line) => line.points.length).map((line) => ({
      name: line.name,
      point: line.points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best)),
    }));
    const step = Math.round(first + ((x - left) / (right - left)) * (last - first));
    const value = (y) => said(low + ((bottom - y) / (bottom - top)) * (high - low));
    readout.textContent = `step ${step}: ` + near.map((line) => `${line.name} ${value(line.point[1])}`).join(", ");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    chart.append(cursor);
  });
  chart.addEventListener("pointerleave", () => {
    cursor.remove();
    readout.textContent = "";
  });
}
