"use strict";
// Curves as inline SVG. A line is {name, key, dashed, area, values: [number | null]}; key picks the colour.

const Charts = (() => {
  const SPACE = "http://www.w3.org/2000/svg";
  const HEIGHT = 150, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 20;

  function svg(name, attributes, parent) {
    const node = document.createElementNS(SPACE, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  }

  // The smallest of 1, 2, 2.5, 5 times a power of ten that leaves at most four steps.
  function step(top) {
    const power = 10 ** Math.floor(Math.log10(top / 4));
    return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => top / each <= 4.001);
  }

  function clock(seconds, range) {
    const time = new Date(seconds * 1000);
    const two = (number) => String(number).padStart(2, "0");
    if (range > 86400) return `${time.getDate()} ${time.toLocaleString("en", { month: "short" })}`;
    return `${two(time.getHours())}:${two(time.getMinutes())}`;
  }

  function ticks(start, end) {
    const wanted = [60, 180, 300, 900, 3600, 7200, 21600, 43200, 86400];
    const width = wanted.find((each) => (end - start) / each <= 6) || 86400;
    const offset = new Date(start * 1000).getTimezoneOffset() * 60;
    const found = [];
    for (let at = Math.ceil((start - offset) / width) * width + offset; at <= end; at += width) found.push(at);
    return found;
  }

  // A gap in the samples is a gap in the line: nothing is known of it.
  function pieces(times, values, gap) {
    const found = [];
    let piece = null;
    times.forEach((at, index) => {
      const value = values[index];
      if (value === null || value === undefined) { piece = null; return; }
      if (!piece || at - piece[piece.length - 1].at > gap) found.push((piece = []));
      piece.push({ at, value });
    });
    return found;
  }

  function areaPath(points, x, y) {
    const upper = points.map((p) => `${x(p.at)},${y(p.value[1])}`);
    const lower = points.map((p) => `${x(p.at)},${y(p.value[0])}`).reverse();
    return `M${[...upper, ...lower].join("L")}Z`;
  }

  function linePath(points, x, y) {
    const path = points.map((p) => `${x(p.at)},${y(p.value)}`).join("L");
    // One point alone is a dot: a line without length and with round ends.
    return points.length === 1 ? `M${path}h.01` : `M${path}`;
  }

  function topOf(lines, atLeast, fixed) {
    if (fixed) return fixed;
    const values = lines.flatMap((line) => line.values).filter((value) => value !== null && value !== undefined);
    return Math.max(atLeast, ...values) * 1.05;
  }

  function axes(picture, width, start, end, top, format, x, y) {
    const each = step(top);
    for (let value = 0; value <= top * 1.0001; value += each) {
      svg("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: value ? "grid" : "axis" }, picture);
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, picture).textContent = format(value, each);
    }
    for (const at of ticks(start, end)) {
      const label = svg("text", { x: x(at), y: HEIGHT - 4, "text-anchor": "middle" }, picture);
      label.textContent = clock(at, end - start);
    }
  }

  function nearest(times, at) {
    let best = 0;
    times.forEach((time, index) => { if (Math.abs(time - at) < Math.abs(times[best] - at)) best = index; });
    return best;
  }

  function tip(figure, chart, index, left, width) {
    const box = figure.querySelector(".tip") || figure.appendChild(document.createElement("div"));
    box.className = "tip";
    const time = document.createElement("div");
    time.textContent = new Date(chart.times[index] * 1000).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });
    const rows = chart.lines.filter((line) => line.values[index] !== null && line.values[index] !== undefined).map((line) => {
      const value = line.area ? line.values[index][1] - line.values[index][0] : line.values[index];
      const row = document.createElement("div"), dot = document.createElement("span");
      dot.className = `dot k${line.key}`;
      row.append(dot, `${line.name}: ${chart.tell(value)}`);
      return row;
    });
    box.replaceChildren(time, ...rows);
    const side = left > width / 2 ? "right" : "left";
    box.style.left = box.style.right = "";
    box.style[side] = `${(side === "left" ? left : width - left) + 12}px`;
  }

  function follow(figure, picture, chart, x, start, end, width) {
    const cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" }, picture);
    picture.onpointermove = (event) => {
      if (!chart.times.length) return;
      const box = picture.getBoundingClientRect();
      const at = start + ((event.clientX - box.left - LEFT) / (width - LEFT - RIGHT)) * (end - start);
      const index = nearest(chart.times, at), left = x(chart.times[index]);
      for (const name of ["x1", "x2"]) cursor.setAttribute(name, left);
      cursor.setAttribute("visibility", "visible");
      tip(figure, chart, index, left, width);
    };
    picture.onpointerleave = () => {
      cursor.setAttribute("visibility", "hidden");
      figure.querySelector(".tip")?.remove();
    };
  }

  // chart: {title, hint, times, lines, start, end, gap, top, atLeast, format, tell}
  function draw(figure, chart) {
    if (figure.matches(":hover") && figure.querySelector(".tip")) return; // Not under the reader's hand.
    const width = Math.max(260, figure.clientWidth || 400);
    const { start, end } = chart, top = topOf(chart.lines, chart.atLeast, chart.top);
    const x = (at) => +(LEFT + ((at - start) / (end - start)) * (width - LEFT - RIGHT)).toFixed(1);
    const y = (value) => +(TOP + (1 - Math.min(value, top) / top) * (HEIGHT - TOP - BOTTOM)).toFixed(1);
    const caption = document.createElement("figcaption"), hint = document.createElement("span");
    hint.textContent = chart.hint;
    caption.append(chart.title, hint);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": chart.title });
    axes(picture, width, start, end, top, chart.format, x, y);
    for (const line of chart.lines) {
      for (const points of pieces(chart.times, line.values, chart.gap)) {
        const classes = `k${line.key}${line.dashed ? " dashed" : ""}${line.area ? " area" : ""}`;
        svg("path", { d: (line.area ? areaPath : linePath)(points, x, y), class: classes }, picture);
      }
    }
    const any = chart.lines.some((line) => line.values.some((value) => value !== null && value !== undefined));
    if (!any) svg("text", { x: width / 2, y: HEIGHT / 2 - 4, "text-anchor": "middle" }, picture).textContent = "nothing in this time";
    follow(figure, picture, chart, x, start, end, width);
    figure.replaceChildren(caption, picture);
  }

  return { draw };
})();
