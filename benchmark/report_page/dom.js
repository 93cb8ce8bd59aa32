"use strict";
const page = JSON.parse(document.getElementById("data").textContent);

// Elements are made of text nodes and attributes only: no text of a record is ever read as markup.
function make(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function section(name) {
  return document.getElementById(name);
}

const isLoss = (metric) => page.less.includes(metric);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// Metrics in percent with two digits, losses as they are with five: as benchmark/compare.py writes them.
function score(value, metric, signed) {
  if (!isNumber(value)) return "–";
  const text = isLoss(metric) || /loss|entropy/i.test(metric) ? Math.abs(value).toFixed(5) : (100 * Math.abs(value)).toFixed(2);
  if (signed && Number(text) === 0) return text;
  return (value < 0 ? "−" : signed ? "+" : "") + text;
}

function count(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en-US") : "–";
}

function short(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return Number((value / 1e9).toFixed(2)) + " G";
  if (size >= 1e6) return Number((value / 1e6).toFixed(2)) + " M";
  if (size >= 1e4) return Number((value / 1e3).toFixed(1)) + " k";
  if (size && size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return String(Number(value.toPrecision(4)));
}

const percent = (value) => (isNumber(value) ? (100 * value).toFixed(value < 0.0995 ? 1 : 0) + " %" : "–");

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 90) return Math.round(seconds) + " s";
  if (seconds < 5400) return Math.round(seconds / 60) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}

function moment(text) {
  const found = /^(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)/.exec(text || "");
  return found ? `${found[1]}-${found[2]}-${found[3]} ${found[4]}:${found[5]}` : text || "–";
}

const unique = (values) => [...new Set(values)];

function groupBy(values, key) {
  const groups = new Map();
  for (const value of values) {
    const name = key(value);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(value);
  }
  return groups;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function deviation(values) {
  if (values.length < 2) return null;
  const centre = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - centre) ** 2, 0) / (values.length - 1));
}

// A table that scrolls by itself, by touch and by keyboard, so that the page never has to.
function scrolling(label, table, caption) {
  const note = typeof caption === "string" ? make("p", { class: "quiet" }, caption) : caption;
  const box = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
  return note ? make("div", {}, note, box) : box;
}

const plural = (number, one) => `${count(number)} ${one}${number === 1 ? "" : "s"}`;

function chooser(label, options, onchange) {
  const select = make("select", { "aria-label": label, onchange: () => onchange(select.value) },
    options.map(([value, text]) => make("option", { value }, text)));
  return [make("label", {}, label, select), select];
}

function listed(items) {
  return make("ul", { class: "plain" }, items.map((item) => make("li", {}, item)));
}
