/* view.js - the page of fox-graph dump --format html; embedded by the build.
 *
 * The file gives every box's class its rows and places, with all boxes closed (view_layout.c); here
 * some are open: sizes from the inside out, then places, as in view_frame.c.  The graph is drawn on
 * a canvas, only what is seen; panels are elements.  Every text reaches the page by textContent. */
'use strict';
(() => {
const D = JSON.parse(document.getElementById('graph').textContent);
const S = D.strings, N = D.nodes, V = D.values, B = D.boxes, C = D.classes, M = D.meta;
const PAD = 14, HEAD = 26, ROW = 22, COL = 16, GAP = 96, PILL = 92, CHIP = 124, PH = 20, PG = 4,
      STACK = 3;
const FORWARD = 0, BACKWARD = 1, UPDATE = 2, LANES = ['forward', 'backward', 'optimizer'];
const ITEM = 0, PORT_IN = 1, PORT_OUT = 2, BEND = 3;
const NODE = 0, BOX = 1, RUN = 2, INPUT = 3, OUTPUT = 4;
const HUE = ['f', 'b', 'u'];
const nNodes = N.op.length, nBoxes = B.name.length, nValues = V.kind.length;
const $ = id => document.getElementById(id);
const SIGN = { add: '+', mul: '\u00d7', sub: '\u2212', div: '\u00f7' };

/* ---- words ----------------------------------------------------------------------------------- */

const scaled = (x, step, units) => {
  let i = 0;
  while (Math.abs(x) >= step * 0.99995 && i < units.length - 1) { x /= step; i++; }
  return (i && Math.abs(x) < 100 ? x.toFixed(1) : x.toFixed(0)) + units[i];
};
const bytes = x => scaled(x, 1024, [' B', ' KiB', ' MiB', ' GiB', ' TiB', ' PiB']);
const amount = x => scaled(x, 1000, ['', ' k', ' M', ' G', ' T', ' P']);
const real = x => Number.isFinite(x) ? String(+x.toPrecision(4)) : '?';
const heatWords = (x, h) => x < 0 ? 'not known'
  : h === 'bytes' ? bytes(x)
  : h === 'time' ? (x < 1000 ? real(x) + ' \u00b5s' : real(x / 1000) + ' ms')
  : h === 'flops' ? amount(x) + (x < 999.95 ? ' FLOP' : 'FLOP')
  : h === 'intensity' ? real(x) + ' FLOP/B' : real(x);
const shapeWords = v => S[V.shape[v]].replace(/,/g, '\u00d7') || 'scalar';
const op = k => S[N.op[k]];
const at = k => S[N.user[k]] || S[N.src[k]];
const cut = (s, n) => s.length > n ? s.slice(0, n - 1) + '\u2026' : s;

/* The parameter that a node is about, as its scope calls it. */
function label(k) {
  let x = N.param[k], box = N.param[k] >= 0 ? N.box[k] : -1;
  if (x < 0 && N.pass[k] === FORWARD) { x = N.in[k].find(v => v >= 0 && V.kind[v] === 2); box = N.scope[k]; }
  if (x === undefined || x < 0) return '';
  const name = S[V.name[x]], path = S[B.path[box]];
  const inner = path && name.startsWith(path + '.') ? name.slice(path.length + 1) : name;
  return cut(inner.replace(/\.weight$/, '') || inner, 30);
}

/* ---- structure ------------------------------------------------------------------------------- */

const attached = Array.from({ length: nNodes }, () => []);
for (let k = 0; k < nNodes; k++) if (N.home[k] !== k) attached[N.home[k]].push(k);
const readers = Array.from({ length: nValues }, () => []);
for (let k = 0; k < nNodes; k++) for (const v of N.in[k]) if (v >= 0) readers[v].push(k);
const place = new Int32Array(nNodes);
D.drawn.forEach((k, i) => { place[k] = i; });
const runOf = new Map();                  /* box -> [its run's first box, which one of it it is] */
for (let b = 0; b < nBoxes; b++)
  for (const [kind, ref, count] of B.items[b])
    for (let i = 0; kind === RUN && i < count; i++)
      runOf.set(B.child[b][ref + i], [B.child[b][ref], i, count, b]);
for (const c of C) {
  c.rowOf = new Int32Array(c.cells.length);
  for (let r = 0; r + 1 < c.rows.length; r++) c.rowOf.fill(r, c.rows[r], c.rows[r + 1]);
  c.ports = [new Map(), new Map()];
  c.cellOf = [];
  c.cells.forEach((x, i) => {
    if (x[0] === ITEM) c.cellOf[x[1]] = i;
    if (x[0] === PORT_IN) c.ports[0].set(x[1], i);
    if (x[0] === PORT_OUT) c.ports[1].set(x[1], i);
  });
}
const saved = k => {                      /* values kept for the backward nodes beside node k */
  const found = new Set();
  for (const a of attached[k]) if (N.pass[a] === BACKWARD)
    for (let v of N.in[a]) {
      while (v >= 0 && V.maker[v] >= 0 && N.flags[V.maker[v]] & 2 && N.in[V.maker[v]][0] >= 0)
        v = N.in[V.maker[v]][0];
      if (v >= 0 && V.maker[v] >= 0 && N.pass[V.maker[v]] === FORWARD) found.add(v);
    }
  return [...found];
};
const sumBytes = list => list.reduce((s, v) => s + V.bytes[v], 0);
const chips = k => {                      /* updates beside node k, by parameter */
  const by = new Map();
  for (const a of attached[k]) if (N.pass[a] === UPDATE) {
    if (!by.has(N.param[a])) by.set(N.param[a], []);
    by.get(N.param[a]).push(a);
  }
  return [...by.values()];
};
const nodesOf = function* (b) { for (let i = B.first[b]; i < B.end[b]; i++) yield D.drawn[i]; };
const inLanes = new Map();
const inLaneOf = (b, lane) => {            /* nodes of a lane in a box */
  if (!inLanes.has(b)) {
    const n = [0, 0, 0];
    for (const k of nodesOf(b)) n[N.pass[k]]++;
    inLanes.set(b, n);
  }
  return inLanes.get(b)[lane];
};
const paths = new Map();
for (let b = nBoxes - 1; b >= 0; b--) paths.set(S[B.path[b]], b);

/* ---- state ----------------------------------------------------------------------------------- */

const state = {
  open: new Set(), turn: new Map(), sel: null, path: null, heat: M.heat || 'none',
  lanes: [true, true, true], memory: M.memory && D.plans.length > 0 && innerWidth > 900, theme: '', x: 0, y: 0, k: 1
};
/* What a box is called whichever of a run's is shown: the path with each run's first in it. */
const keys = new Map();
function key(b) {
  if (keys.has(b)) return keys.get(b);
  const run = runOf.get(b), twin = run ? run[0] : b;
  const up = B.parent[b], name = S[B.name[twin]];
  const x = b === 0 ? '' : up === 0 ? name : key(up) + '/' + name;
  keys.set(b, x);
  return x;
}
const isOpen = b => b === 0 || state.open.has(key(b));
const shown = (b, item) => item[0] === BOX ? item[1]
  : item[0] === RUN ? B.child[b][item[1] + Math.min(item[2] - 1, state.turn.get(key(B.child[b][item[1]])) || 0)]
  : -1;

/* ---- heat ------------------------------------------------------------------------------------ */

const heats = ['none', 'flops', 'bytes', 'intensity'];
if (M.timed) heats.push('time');
if (M.seen) heats.push('absmax', 'gradnorm');
if (!heats.includes(state.heat)) state.heat = 'none';
function heat(k, h) {
  if (h === 'flops') return N.flops[k];
  if (h === 'bytes') return N.bytes[k];
  if (h === 'intensity') return N.bytes[k] > 0 ? N.flops[k] / N.bytes[k] : 0;
  if (h === 'time') return N.flags[k] & 2 ? 0 : N.time[k];
  let most = -1;
  for (const v of N.out[k]) {
    const s = D.stats[V.stats[v]];
    if (!s || (h === 'gradnorm' && N.pass[k] !== BACKWARD)) continue;
    const count = S[V.shape[v]].split(',').reduce((p, x) => p * (x === '' ? 1 : +x), 1);
    most = Math.max(most, h === 'gradnorm' ? s[3] * Math.sqrt(count)
                                           : Math.max(Math.abs(s[0]), Math.abs(s[1])));
  }
  return most;
}
let boxHeats = new Map(), range = [0, 0];
function boxHeat(b, lane, h = state.heat) {
  const id = h + b + '.' + lane;
  if (boxHeats.has(id)) return boxHeats.get(id);
  let sum = -1, flops = 0, moved = 0;
  for (const k of nodesOf(b)) {
    if (N.pass[k] !== lane) continue;
    const x = heat(k, h);
    flops += N.flops[k]; moved += N.bytes[k];
    if (x >= 0) sum = h === 'absmax' || h === 'gradnorm' ? Math.max(sum, x) : Math.max(sum, 0) + x;
  }
  if (h === 'intensity') sum = moved > 0 ? flops / moved : -1;
  boxHeats.set(id, sum);
  return sum;
}
function setHeat(h) {
  state.heat = h;
  boxHeats = new Map();
  let least = Infinity, most = 0;
  for (let k = 0; k < nNodes && h !== 'none'; k++) {
    const x = heat(k, h);
    if (x > 0) { least = Math.min(least, x); most = Math.max(most, x); }
  }
  if (h !== 'none') for (let i = 0; i < 3; i++) most = Math.max(most, boxHeat(0, i));
  range = [Math.max(least, most * 1e-6), most];
}
const strength = x => state.heat === 'none' ? 0.12 : !(x > 0) ? 0.03 : range[1] <= range[0] ? 0.8
  : 0.06 + 0.79 * Math.max(0, Math.log(x / range[0])) / Math.log(range[1] / range[0]);

/* ---- layout ---------------------------------------------------------------------------------- */

function spread(x, w, weight) {            /* pool adjacent violators, as fg__view_spread */
  const mean = [], heavy = [], count = [], off = [];
  let o = 0;
  for (let i = 0; i < x.length; i++) {
    if (i) o += (w[i - 1] + w[i]) / 2 + COL;
    off.push(o);
    mean.push(x[i] - o); heavy.push(weight[i]); count.push(1);
    while (mean.length > 1 && mean[mean.length - 1] < mean[mean.length - 2]) {
      const m = mean.pop(), h = heavy.pop(), c = count.pop(), j = mean.length - 1;
      mean[j] = (mean[j] * heavy[j] + m * h) / (heavy[j] + h);
      heavy[j] += h; count[j] += c;
    }
  }
  const out = [];
  for (let p = 0; p < mean.length; p++) for (let i = 0; i < count[p]; i++) out.push(mean[p] + off[out.length]);
  return out;
}

let frames = new Map();
function sizeOf(b, i) {
  const item = B.items[b][i], inner = shown(b, item), s = C[B.cls[b]].size[i];
  if (inner >= 0 && isOpen(inner)) {
    const f = frames.get(inner);
    return { w: f.w, h: f.w.map(w => w > 0 ? f.h : 0), open: inner };
  }
  const w = s.slice(0, 3), h = s.slice(3);
  for (let lane = 0; lane < 3; lane++) if (!state.lanes[lane]) w[lane] = h[lane] = 0;
  return { w, h, open: -1 };
}

function measure(b) {
  const c = C[B.cls[b]], rows = c.rows.length - 1;
  for (const item of B.items[b]) {
    const inner = shown(b, item);
    if (inner >= 0 && isOpen(inner)) measure(inner);
  }
  const f = { w: [0, 0, 0], h: 0, x: [[], [], []], y: [], rh: [], size: [], top: [] };
  f.size = B.items[b].map((_, i) => sizeOf(b, i));
  let y = HEAD;
  for (let r = 0; r < rows; r++) {
    let h = 8, edge = true;
    for (let i = c.rows[r]; i < c.rows[r + 1]; i++) {
      const kind = c.cells[i][0];
      if (kind === ITEM || kind === BEND) edge = false;
      if (kind === ITEM) h = Math.max(h, ...f.size[c.cells[i][1]].h);
    }
    f.y.push(y);
    f.rh.push(edge ? 0 : h);
    y += f.rh[r] + (edge ? 12 : ROW);
  }
  f.h = y - (rows ? ROW : 0) + PAD;
  const name = S[B.name[b]].length * 7.6 + (runOf.has(b) ? 150 : 30);
  for (let lane = 0; lane < 2; lane++) {
    let left = Infinity, right = -Infinity, widest = 0;
    for (let r = 0; r < rows; r++) {
      const cells = c.cells.slice(c.rows[r], c.rows[r + 1]);
      const w = cells.map(x => x[0] === ITEM ? f.size[x[1]].w[lane] : x[0] === BEND ? 4 : 10);
      const x = spread(cells.map(q => q[2 + lane]), w, cells.map(q => q[0] === ITEM ? 100 : 1));
      cells.forEach((q, i) => {
        left = Math.min(left, x[i] - w[i] / 2);
        right = Math.max(right, x[i] + w[i] / 2);
        if (q[0] === ITEM) widest = Math.max(widest, w[i]);
        f.x[lane].push(x[i]);
      });
    }
    f.x[lane] = f.x[lane].map(x => x + PAD - left);
    f.w[lane] = widest > 0 && state.lanes[lane] ? Math.max(right - left, name) + 2 * PAD : 0;
  }
  for (let r = 0; r < rows; r++) {
    let x = PAD;
    for (let i = c.rows[r]; i < c.rows[r + 1]; i++) {
      const w = c.cells[i][0] === ITEM ? f.size[c.cells[i][1]].w[UPDATE] : 0;
      f.x[UPDATE].push(x + w / 2);
      if (w > 0) x += w + PG * 2;
    }
    if (x > PAD && state.lanes[UPDATE]) f.w[UPDATE] = Math.max(f.w[UPDATE], x - PG * 2 + PAD);
  }
  frames.set(b, f);
  return f;
}

let lanes = [0, 0, 0], total = { w: 0, h: 0 };
function layout() {
  frames = new Map();
  const f = measure(0);
  let x = 0;
  for (let lane = 0; lane < 3; lane++) {
    lanes[lane] = x;
    if (f.w[lane] > 0) x += f.w[lane] + GAP;
  }
  total = { w: Math.max(x - GAP, 1), h: f.h };
}

/* ---- drawing --------------------------------------------------------------------------------- */

const canvas = $('canvas'), g = canvas.getContext('2d');
let colors = {}, hits = [], width = 0, height = 0, frameTime = 0, marks = new Map();
let hovered = -1;                          /* the node whose twins are shown while the pointer is there */
const rgba = (hue, a) => `rgba(${colors[hue]},${a})`;
function readColors() {
  const css = getComputedStyle(document.documentElement);
  colors = {};
  for (const name of ['f', 'b', 'u', 'k', 'x', 'ink', 'soft', 'page', 'panel', 'pill', 'pill-line', 'edge',
                      'mark', 'line'])
    colors[name] = css.getPropertyValue('--' + name).trim();
}
const FONT = 'system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif';
const font = (px, bold) => { g.font = (bold ? '600 ' : '') + px + 'px ' + FONT; };
function round(x, y, w, h, r) {
  g.beginPath();
  g.roundRect(x, y, w, h, Math.min(r, w / 2, h / 2));
}
function text(s, x, y, px, color, align, bold, room) {
  if (px * state.k < 3.4) return;
  font(px, bold);
  g.fillStyle = color;
  g.textAlign = align;
  if (room) while (s.length > 2 && g.measureText(s).width > room) s = s.slice(0, -2) + '\u2026';
  g.fillText(s, x, y);
}
/* Is a rectangle of the graph on the screen? */
const seen = (x, y, w, h) => x * state.k + state.x < width && (x + w) * state.k + state.x > 0 &&
                             y * state.k + state.y < height && (y + h) * state.k + state.y > 0;
function hit(kind, ref, lane, x, y, w, h, more) {
  hits.push({ kind, ref, lane, x: x * state.k + state.x, y: y * state.k + state.y, w: w * state.k,
              h: h * state.k, ...more });
}
function ring(kind, ref, x, y, w, h, r) {
  const twin = kind === 'node' && hovered >= 0 && N.home[ref] === hovered;
  const mark = marks.get(kind + ref) || (twin ? 3 : 0);
  if (!mark) return;
  g.save();
  g.lineWidth = (mark === 2 ? 3 : mark === 1 ? 2 : 1.5) / Math.min(1, Math.max(state.k, 0.3));
  g.strokeStyle = mark === 1 ? rgba('k', 0.95) : colors.mark;
  if (mark === 1) g.setLineDash([5, 3]);
  round(x - 3, y - 3, w + 6, h + 6, r + 3);
  g.stroke();
  g.restore();
}
const inkOn = (hue, a) => a > 0.6 && document.documentElement.dataset.theme !== 'dark' ? '#fff' : colors.ink;

function drawForward(k, x, y, s) {
  const w = s.w[0], h = s.h[0], left = x - w / 2, top = y - h / 2;
  if (!seen(left, top, w, h)) return;
  const view = N.flags[k] & 8, bad = N.error[k] > 0, a = strength(heat(k, state.heat));
  const hue = bad ? 'x' : 'f', sign = !bad && SIGN[op(k)];
  if (sign) { g.beginPath(); g.arc(x, y, 15, 0, 7); } else round(left, top, w, h, view ? 10 : 6);
  g.fillStyle = view ? colors.pill : colors.panel; g.fill();
  if (!view) { g.fillStyle = rgba(hue, bad ? 0.25 : a); g.fill(); }
  g.lineWidth = bad ? 2.4 : 1.3;
  g.strokeStyle = view ? colors['pill-line'] : rgba(hue, 0.9);
  g.stroke();
  const shape = N.out[k].length ? shapeWords(N.out[k][0]) : '', ink = inkOn(hue, a);
  const dtype = N.out[k].length ? S[V.dtype[N.out[k][0]]] : '';
  if (sign) text(sign, x, y + 5, 15, ink, 'center', true);
  else if (view) text(op(k) + ' ' + shape, x, y + 3.5, 10, colors.soft, 'center', false, w - 8);
  else {
    const name = label(k);
    font(12, true);
    const wide = g.measureText(op(k)).width;
    font(11);
    const more = name ? g.measureText(name).width + 7 : 0, start = x - (wide + more) / 2;
    text(op(k), start, y - 3, 12, ink, 'left', true);
    if (name) text(name, start + wide + 7, y - 3, 11, ink, 'left');
    text(bad ? 'does not type-check' : (dtype === 'f32' ? '' : dtype + ' ') + shape, x, y + 12, 10,
         a > 0.6 ? ink : colors.soft, 'center');
  }
  if (!sign && state.k > 0.85) text(at(k), left + 3, top - 3, 7, colors.soft, 'left');
  if (D.firstBad === k) { g.beginPath(); g.arc(left + w, top, 5, 0, 7); g.fillStyle = rgba('x', 1); g.fill(); }
  hit('node', k, 0, left, top, w, h);
  ring('node', k, left, top, w, h, sign ? 15 : 6);
}

function drawPill(k, lane, x, y, w, words, list) {
  if (!seen(x, y, w, PH)) return;
  const bad = N.error[k] > 0, hue = bad ? 'x' : HUE[lane];
  const a = strength(list ? Math.max(...list.map(n => heat(n, state.heat))) : heat(k, state.heat));
  round(x, y, w, PH, 5);
  g.fillStyle = colors.panel; g.fill();
  g.fillStyle = rgba(hue, a); g.fill();
  g.lineWidth = 1.1; g.strokeStyle = rgba(hue, 0.8);
  if (N.flags[k] & 1) g.setLineDash([4, 3]);
  g.stroke();
  g.setLineDash([]);
  text(words, x + w / 2, y + 14, 10.5, inkOn(hue, a), 'center', false, w - 8);
  for (const n of list || [k]) { hit('node', n, lane, x, y, w, PH); ring('node', n, x, y, w, PH, 5); }
}

function drawAttached(k, lane, x, y, s) {
  const w = lane === BACKWARD ? PILL : CHIP, left = x - s.w[lane] / 2, top = y - s.h[lane] / 2;
  if (N.pass[k] === lane) { drawPill(k, lane, left, top, w, op(k)); return; }
  const list = lane === BACKWARD ? attached[k].filter(a => N.pass[a] === BACKWARD).map(a => [a]) : chips(k);
  list.forEach((group, i) => {
    const words = lane === BACKWARD ? (N.flags[group[0]] & 1 ? '\u21bb ' : '') + op(group[0])
                                    : label(group[0]) || op(group[0]);
    drawPill(group[0], lane, left + Math.floor(i / STACK) * (w + PG), top + i % STACK * (PH + PG), w,
             words, group);
  });
}

function boxName(b, item) {
  if (item[0] !== RUN) return S[B.name[item[1]]];
  const first = B.child[b][item[1]], last = B.child[b][item[1] + item[2] - 1];
  return `${S[B.name[first]]} \u2026 ${S[B.name[last]]}  \u00d7 ${item[2]}`;
}

function drawClosed(b, item, inner, lane, x, y, s) {
  const w = s.w[lane], h = s.h[lane], left = x - w / 2, top = y - h / 2;
  if (!seen(left - 9, top - 9, w + 18, h + 18)) return;
  const a = strength(boxHeat(inner, lane)), hue = HUE[lane];
  for (let i = item[0] === RUN ? 2 : 0; i > 0; i--) {
    round(left + i * 4, top - i * 4, w, h, 7);
    g.fillStyle = colors.panel; g.fill();
    g.lineWidth = 1; g.strokeStyle = rgba(hue, 0.45); g.stroke();
  }
  round(left, top, w, h, 7);
  g.fillStyle = colors.panel; g.fill();
  g.fillStyle = rgba(hue, a); g.fill();
  g.lineWidth = 1.4; g.strokeStyle = rgba(hue, 0.9); g.stroke();
  text('\u25b8 ' + boxName(b, item), x, y - 3, 12, inkOn(hue, a), 'center', true, w - 8);
  const words = state.heat === 'none' ? inLaneOf(inner, lane) + ' nodes' : heatWords(boxHeat(inner, lane), state.heat);
  text(words, x, y + 13, 10.5, a > 0.6 ? inkOn(hue, a) : colors.soft, 'center');
  hit('box', inner, lane, left, top, w, h, { closed: true });
  ring('box', inner, left, top, w, h, 7);
}

function middle(f, c, i, y) {
  const s = f.size[c.cells[i][1]];
  return y + f.y[c.rowOf[i]] + Math.max(...s.h) / 2;
}
/* Where an edge meets a cell: the port of an open box, else its middle. */
function meets(f, c, i, lane, port, lower) {
  const x = f.x[lane][i];
  if (c.cells[i][0] !== ITEM) return x;
  const open = f.size[c.cells[i][1]].open;
  if (open < 0) return x;
  const inner = frames.get(open), cell = C[B.cls[open]].ports[lower ? 1 : 0].get(port);
  return inner.w[lane] > 0 && cell !== undefined ? x - inner.w[lane] / 2 + inner.x[lane][cell] : x;
}
const joint = (b, c, cell) => c.cells[cell][0] === ITEM && B.items[b][c.cells[cell][1]][0] === NODE &&
  op(B.items[b][c.cells[cell][1]][1]) === 'add' && N.pass[B.items[b][c.cells[cell][1]][1]] === FORWARD;
const inLane = (b, f, c, i, lane) => c.cells[i][0] !== ITEM || f.size[c.cells[i][1]].w[lane] > 0 ||
  (lane === BACKWARD && joint(b, c, i));
function line(x0, y0, x1, y1) {
  const m = (y0 + y1) / 2;
  if (Math.abs(x0 - x1) < 0.5) g.lineTo(x1, y1);
  else g.bezierCurveTo(x0, m, x1, m, x1, y1);
}

function drawEdge(b, f, c, e, lane, x, y) {
  const [from, fromPort, to, toPort, , back, bends] = e;
  const r0 = c.rowOf[from], r1 = c.rowOf[to];
  const half = i => c.cells[i][0] === ITEM ? f.size[c.cells[i][1]].h[lane] / 2 : 0;
  const x0 = x + meets(f, c, from, lane, fromPort, true), x1 = x + meets(f, c, to, lane, toPort, false);
  const y0 = c.cells[from][0] === PORT_IN ? y : middle(f, c, from, y) + half(from);
  const out = c.cells[to][0] === PORT_OUT;
  const y1 = out ? y + f.h : middle(f, c, to, y) - half(to);
  if ((Math.max(y0, y1) * state.k + state.y < 0) || (Math.min(y0, y1) * state.k + state.y > height)) return;
  g.beginPath();
  g.moveTo(x0, y0);
  let px = x0, py = back ? y0 : Math.max(y0, y + f.y[r0] + f.rh[r0]);
  if (py > y0) g.lineTo(px, py);
  for (const i of bends) {
    const bx = x + f.x[lane][i], top = y + f.y[c.rowOf[i]], end = top + f.rh[c.rowOf[i]];
    line(px, py, bx, top);
    g.lineTo(bx, end);
    px = bx; py = end;
  }
  const top = out || back ? y1 : y + f.y[r1];
  line(px, py, x1, top);
  if (y1 > top) g.lineTo(x1, y1);
  if (lane && c.cells[from][0] === ITEM) { g.moveTo(x0 - 3, y0 + 6); g.lineTo(x0, y0); g.lineTo(x0 + 3, y0 + 6); }
  if (!lane && c.cells[to][0] === ITEM) { g.moveTo(x1 - 3, y1 - 6); g.lineTo(x1, y1); g.lineTo(x1 + 3, y1 - 6); }
  g.stroke();
}

function drawEdges(b, f, c, x, y) {
  for (let lane = 0; lane < 2; lane++) {
    if (f.w[lane] <= 0) continue;
    g.lineWidth = 1.25;
    for (const e of c.edges) {
      const v = e[4];
      if (!inLane(b, f, c, e[0], lane) || !inLane(b, f, c, e[2], lane)) continue;
      if (lane && (V.kind[v] === 1 || S[V.dtype[v]] === 'i32')) continue;
      g.strokeStyle = lane ? rgba('b', 0.5) : colors.edge;
      drawEdge(b, f, c, e, lane, x[lane], y);
    }
  }
}

function drawSaved(b, f, c, x, y) {
  g.setLineDash([2, 3]);
  g.lineWidth = 1.2;
  for (let r = 0; r + 1 < c.rows.length; r++) {
    let sum = 0, n = 0;
    for (let i = c.rows[r]; i < c.rows[r + 1]; i++) {
      if (c.cells[i][0] !== ITEM) continue;
      const item = B.items[b][c.cells[i][1]], s = f.size[c.cells[i][1]], inner = shown(b, item);
      if (s.open >= 0) continue;
      const kept = item[0] === NODE ? sumBytes(saved(item[1])) : inner >= 0 ? B.saved[inner] * item[2] : 0;
      if (!kept) continue;
      const my = middle(f, c, i, y) + 5 * n++ - 4;
      g.strokeStyle = (item[0] === NODE && item[1] === hovered) || marks.get((item[0] === NODE ? 'node' : 'box') + (item[0] === NODE ? item[1] : inner))
        ? colors.mark : colors.edge;
      g.beginPath();
      g.moveTo(x[0] + f.x[0][i] + s.w[0] / 2, my);
      g.lineTo(x[1] + f.x[1][i] - s.w[1] / 2, my);
      g.stroke();
      sum += kept;
    }
    if (sum) text(bytes(sum), lanes[1] - GAP / 2, y + f.y[r] + 9, 10.5, colors.soft, 'center');
  }
  g.setLineDash([]);
}

function drawOpen(b, x, y, owner, item) {
  const f = frames.get(b), c = C[B.cls[b]];
  if (!f.w.some((w, lane) => w > 0 && seen(x[lane], y, w, f.h)) && !seen(x[0], y, lanes[1] - x[0], f.h)) return;
  for (let lane = 0; lane < 3 && b; lane++) {
    if (f.w[lane] <= 0) continue;
    round(x[lane], y, f.w[lane], f.h, 10);
    g.fillStyle = rgba(HUE[lane], 0.045); g.fill();
    g.lineWidth = 1; g.strokeStyle = rgba(HUE[lane], 0.4); g.stroke();
    const run = runOf.get(b);
    const name = run ? `${S[B.name[b]]}  (${run[1] + 1} of ${run[2]} alike)` : S[B.name[b]];
    text('\u25be ' + name, x[lane] + 11, y + 17, 12, colors.ink, 'left', true, f.w[lane] - 20);
    hit('box', b, lane, x[lane], y, f.w[lane], HEAD - 2, { closed: false });
    ring('box', b, x[lane], y, f.w[lane], f.h, 10);
  }
  if (f.w[0] > 0 && f.w[1] > 0) drawSaved(b, f, c, x, y);
  drawEdges(b, f, c, x, y);
  for (let r = 0; r + 1 < c.rows.length; r++) {
    if ((y + f.y[r]) * state.k + state.y > height) break;
    if ((y + f.y[r] + f.rh[r] + 12) * state.k + state.y < 0) continue;
    for (let i = c.rows[r]; i < c.rows[r + 1]; i++)
      if (c.cells[i][0] === ITEM) drawItem(b, f, c, i, x, y);
  }
}

function drawItem(b, f, c, i, x, y) {
  const item = B.items[b][c.cells[i][1]], s = f.size[c.cells[i][1]], my = middle(f, c, i, y);
  const cx = [0, 1, 2].map(lane => x[lane] + f.x[lane][i]), inner = shown(b, item);
  if (s.open >= 0) {
    drawOpen(s.open, cx.map((q, lane) => q - s.w[lane] / 2), my - frames.get(s.open).h / 2, b, item);
    return;
  }
  if (state.lanes[1] && M.has[1] && s.w[1] <= 0 && joint(b, c, i)) {
    g.beginPath(); g.arc(cx[1], my, 3, 0, 7); g.fillStyle = rgba('b', 0.8); g.fill();
  }
  for (let lane = 0; lane < 3; lane++) {
    if (s.w[lane] <= 0) continue;
    if (inner >= 0) drawClosed(b, item, inner, lane, cx[lane], my, s);
    else if (item[0] !== NODE) drawEnd(item, cx[0], my, s);
    else if (lane === FORWARD) drawForward(item[1], cx[0], my, s);
    else drawAttached(item[1], lane, cx[lane], my, s);
  }
}

function drawEnd(item, x, y, s) {
  const v = item[0] === INPUT ? item[1] : D.outputs[item[1]][0];
  round(x - s.w[0] / 2, y - 13, s.w[0], 26, 13);
  g.fillStyle = colors.pill; g.fill();
  g.lineWidth = 1.2; g.strokeStyle = colors['pill-line']; g.stroke();
  text(S[item[0] === INPUT ? V.name[v] : D.outputs[item[1]][1]], x, y + 4, 12, colors.ink, 'center', true,
       s.w[0] - 12);
  hit('value', v, 0, x - s.w[0] / 2, y - 13, s.w[0], 26);
  ring('value', v, x - s.w[0] / 2, y - 13, s.w[0], 26, 13);
}

let queued = false;
function draw() { if (!queued) { queued = true; requestAnimationFrame(drawNow); } }
function drawNow() {
  queued = false;
  const start = performance.now(), ratio = window.devicePixelRatio || 1;
  hits = [];
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.fillStyle = colors.page;
  g.fillRect(0, 0, width, height);
  g.translate(state.x, state.y);
  g.scale(state.k, state.k);
  for (let lane = 0; lane < 3; lane++)
    if (frames.get(0).w[lane] > 0)
      text(LANES[lane], lanes[lane] + 4, 6, 13, rgba(HUE[lane], 1), 'left', true);
  drawOpen(0, lanes, 0, -1, null);
  frameTime = performance.now() - start;
}

/* ---- moving ---------------------------------------------------------------------------------- */

const still = matchMedia('(prefers-reduced-motion: reduce)');
let moving = 0;
function moveTo(x, y, k, now) {
  cancelAnimationFrame(moving);
  if (now || still.matches) { Object.assign(state, { x, y, k }); draw(); save(); return; }
  const from = [state.x, state.y, state.k], start = performance.now();
  const step = t => {
    const u = Math.min(1, (t - start) / 220), e = 1 - (1 - u) ** 3;
    state.x = from[0] + (x - from[0]) * e;
    state.y = from[1] + (y - from[1]) * e;
    state.k = from[2] + (k - from[2]) * e;
    draw();
    if (u < 1) moving = requestAnimationFrame(step);
    else save();
  };
  moving = requestAnimationFrame(step);
}
function fit(now) {
  const k = Math.max(0.02, Math.min(1.15, (width - 40) / total.w, (height - 50) / total.h));
  const readable = Math.max(k, Math.min(0.55, (width - 40) / total.w));
  moveTo((width - total.w * readable) / 2, Math.max(26, (height - total.h * readable) / 2), readable, now);
}
function zoom(by, x = width / 2, y = height / 2) {
  const k = Math.max(0.02, Math.min(4, state.k * by)), q = k / state.k;
  moveTo(x - (x - state.x) * q, y - (y - state.y) * q, k, true);
}
/* The rectangle, on the graph, of a scope, node or value in one lane; undefined if it is not drawn. */
function whereIs(kind, ref, lane) {
  const way = [];
  let inner = kind === 'box' ? ref : kind === 'node' ? N.box[ref] : 0;
  if (kind === 'node' && lane === undefined) lane = N.pass[ref];
  for (let b = inner; b > 0; b = B.parent[b]) way.unshift(b);
  let at = 0, x = lanes.slice(), y = 0;
  const enter = item => {                  /* moves to an item of box at; its size */
    const c = C[B.cls[at]], f = frames.get(at), i = c.cellOf[item];
    if (!f || i === undefined) return null;
    const s = f.size[item], my = middle(f, c, i, y);
    x = x.map((q, k) => q + f.x[k][i] - s.w[k] / 2);
    y = my - (s.open >= 0 ? frames.get(s.open).h : Math.max(...s.h)) / 2;
    return { w: s.w, h: s.open >= 0 ? frames.get(s.open).h : Math.max(...s.h), open: s.open };
  };
  const rect = s => {
    if (!s) return undefined;
    const k = lane === undefined || !(s.w[lane] > 0) ? [0, 1, 2].find(q => s.w[q] > 0) : lane;
    return k === undefined ? undefined : { x: x[k], y, w: s.w[k], h: s.h, lane: k };
  };
  for (const b of way) {
    const item = B.items[at].findIndex(t => shown(at, t) === b), s = item < 0 ? null : enter(item);
    if (!s) return undefined;
    if (b === ref && kind === 'box') return rect(s);
    if (s.open < 0) return undefined;
    at = b;
  }
  const item = B.items[at].findIndex(t => kind === 'node' ? t[0] === NODE && t[1] === N.home[ref]
    : t[0] === INPUT ? t[1] === ref : t[0] === OUTPUT && D.outputs[t[1]][0] === ref);
  return item < 0 ? undefined : rect(enter(item));
}
function center(kind, ref) {
  const r = whereIs(kind, ref);
  if (!r) { draw(); return; }
  const k = Math.max(state.k, Math.min(0.9, (width - 80) / r.w));
  const cx = (r.x + r.w / 2) * k, cy = (r.y + Math.min(r.h / 2, height / 2 / k)) * k;
  moveTo(width / 2 - cx, height / 2 - cy, k, false);
}

/* ---- opening, selecting ---------------------------------------------------------------------- */

function turnTo(b) {                       /* shows box b where its run is folded */
  for (let up = b; up > 0; up = B.parent[up]) {
    const run = runOf.get(up);
    if (run) state.turn.set(key(run[0]), run[1]);
  }
}
function toggle(b, open = !isOpen(b), hold = true) {
  if (b === 0) return;
  const before = hold && hits.find(q => q.kind === 'box' && q.ref === b);
  if (open) state.open.add(key(b)); else state.open.delete(key(b));
  changed();
  if (!before) return;
  const after = whereIs('box', b, before.lane);
  if (after) {
    state.x += before.x - (after.x * state.k + state.x);
    state.y += before.y - (after.y * state.k + state.y);
  }
  draw(); save();
}
function openAll(b, open) {
  const visit = x => {
    for (const item of B.items[x]) {
      const inner = shown(x, item);
      if (inner < 0) continue;
      if (open && !B.made[inner]) state.open.add(key(inner));
      if (!open) state.open.delete(key(inner));
      visit(inner);
    }
  };
  visit(b);
  if (b) { if (open) state.open.add(key(b)); else state.open.delete(key(b)); }
  changed();
}
function reveal(kind, ref) {
  let b = kind === 'box' ? B.parent[ref] : kind === 'node' ? N.box[ref] : -1;
  turnTo(kind === 'box' ? ref : b);
  for (; b > 0; b = B.parent[b]) state.open.add(key(b));
}
function select(kind, ref, options = {}) {
  state.sel = kind ? { kind, ref } : null;
  if (kind === 'value' && V.maker[ref] >= 0 && !options.stay) { select('node', V.maker[ref], options); return; }
  if (kind && options.reveal) reveal(kind, ref);
  if (!options.path) state.path = null;
  if (options.reveal) changed(); else { mark(); panels(); }
  if (options.reveal) center(kind, ref);
  draw(); save();
}
/* 2: selected; 1: belongs to it: twins, makers of what it keeps, updates; or the path. */
function mark() {
  marks = new Map();
  const add = (kind, ref, m) => {
    if ((marks.get(kind + ref) || 0) < m) marks.set(kind + ref, m);
    let b = kind === 'node' ? N.box[ref] : kind === 'box' ? B.parent[ref] : -1, closed = -1;
    for (; b > 0; b = B.parent[b]) if (!isOpen(b)) closed = b;
    if (closed > 0 && (marks.get('box' + closed) || 0) < m) marks.set('box' + closed, m);
  };
  if (state.path) { for (const k of state.path) add('node', k, 1); }
  if (D.diff && !state.path) for (const x of D.diff) for (const k of x.slice(2)) if (k >= 0) add('node', k, 1);
  if (!state.sel) return;
  const { kind, ref } = state.sel;
  add(kind, ref, 2);
  if (kind !== 'node' || state.path) return;
  const home = N.home[ref];
  add('node', home, 1);
  for (const a of attached[home]) add('node', a, 1);
  for (const v of N.pass[ref] === BACKWARD ? N.in[ref] : saved(home))
    if (v >= 0 && V.maker[v] >= 0) add('node', V.maker[v], 1);
}
function changed() { layout(); mark(); panels(); tree(); draw(); save(); }

/* Nodes on a shortest way of values from a to b, or from b to a; null if there is none. */
function findPath(a, b) {
  for (const [from, to] of [[a, b], [b, a]]) {
    const via = new Int32Array(nNodes).fill(-2), queue = [from];
    via[from] = -1;
    for (let i = 0; i < queue.length; i++) {
      if (queue[i] === to) {
        const way = [];
        for (let k = to; k >= 0; k = via[k]) way.unshift(k);
        return way;
      }
      for (const v of N.out[queue[i]]) for (const k of readers[v]) if (via[k] === -2) {
        via[k] = queue[i];
        queue.push(k);
      }
    }
  }
  return null;
}
/* The way back from a node: of its inputs each time the one with the greatest value. */
function ancestors(k) {
  const way = [k];
  const most = x => { const s = D.stats[V.stats[x]]; return s ? (s[4] ? Infinity : Math.max(Math.abs(s[0]), Math.abs(s[1]))) : -1; };
  while (way.length < 40) {
    const from = N.in[way[0]].filter(x => x >= 0 && V.maker[x] >= 0).sort((p, q) => most(q) - most(p))[0];
    if (from === undefined) break;
    way.unshift(V.maker[from]);
  }
  return way;
}
let pathFrom = -1;
function pathTo(k) {
  const way = findPath(pathFrom, k);
  state.path = way || [];
  pathFrom = -1;
  select('node', k, { path: true });
  say(way ? `path of ${way.length} nodes` : 'no path between the two');
}

/* ---- the panel on the right ------------------------------------------------------------------ */

function el(name, words, props = {}) {
  const e = document.createElement(name);
  if (words !== undefined && words !== '') e.textContent = words;
  for (const [k, v] of Object.entries(props))
    if (k === 'onclick') e.addEventListener('click', v); else e.setAttribute(k, v);
  return e;
}
const link = (words, act) => el('button', words, { class: 'link', type: 'button', onclick: act });
const goNode = k => link(op(k) + (label(k) ? ' ' + label(k) : ''), () => select('node', k, { reveal: true }));
function table(rows) {
  const t = el('table');
  for (const [name, value, numeric] of rows) {
    if (value === '' || value === undefined || value === null) continue;
    const tr = el('tr'), td = el('td', '', numeric ? { class: 'n' } : {});
    tr.append(el('td', name), td);
    if (value instanceof Node) td.append(value); else td.textContent = value;
    t.append(tr);
  }
  return t;
}
function section(to, title, ...content) {
  if (!content.some(Boolean)) return;
  to.append(el('h3', title), ...content.filter(Boolean));
}
function valueLine(v, name) {
  const d = el('div'), words = `${S[V.dtype[v]]} ${shapeWords(v)}, ${bytes(V.bytes[v])}`;
  if (name) d.append(el('span', name + ' ', { class: 'soft' }));
  if (V.maker[v] >= 0) d.append(goNode(V.maker[v]));
  else d.append(el('b', S[V.name[v]] || ['value', 'input', 'parameter', 'state'][V.kind[v]]));
  d.append(el('span', '  ' + words, { class: 'soft' }));
  return d;
}
function valueInfo(v, name) {
  const rows = [[name || 'value', `${S[V.dtype[v]]} ${shapeWords(v)}`], ['bytes', bytes(V.bytes[v])]];
  const root = V.root[v], s = D.stats[V.stats[v]];
  if (root !== v) rows.push(['memory', `shared (${S[V.reused[v]] || 'view'})`]);
  if (V.offset[root] >= 0) {
    rows.push(['offset', V.offset[root].toLocaleString('en')]);
    rows.push(['alive', `${V.from[root]} to ${V.to[root]}`]);
    const last = D.byId.get(V.to[root]);
    if (last !== undefined) rows.push(['kept for', goNode(last)]);
  }
  if (s) {
    rows.push(['range', `${real(s[0])} to ${real(s[1])}`], ['mean, rms', `${real(s[2])}, ${real(s[3])}`]);
    if (s[4]) rows.push(['not finite', s[4].toLocaleString('en')]);
  }
  return table(rows);
}
function nodeInfo(to, k) {
  to.append(el('span', LANES[N.pass[k]] + (N.flags[k] & 1 ? ', recomputed' : ''),
               { class: 'lane ' + HUE[N.pass[k]] }));
  to.append(el('h2', op(k) + (label(k) ? '  ' + label(k) : '')));
  const box = N.box[k];
  to.append(link(S[B.path[box]] || 'top level', () => select('box', box, { reveal: true })));
  if (N.error[k] > 0) to.append(el('div', S[N.error[k]], { class: 'error', role: 'alert' }));
  const o = D.ops[N.info[k]];
  if (o) to.append(el('code', S[o[3]], { class: 'formula', style: 'display:block' }));
  const row = el('div', '', { class: 'row' });
  const twins = [N.home[k] !== k && N.pass[k] === BACKWARD ? ['forward twin', N.home[k]] : null,
    N.home[k] === k ? ['backward twin', attached[k].find(a => N.pass[a] === BACKWARD && !(N.flags[a] & 1))] : null];
  for (const t of twins) if (t && t[1] !== undefined)
    row.append(el('button', t[0], { type: 'button', onclick: () => select('node', t[1], { reveal: true }) }));
  row.append(el('button', pathFrom === k ? 'now choose the other end' : 'path to\u2026',
    { type: 'button', id: 'path', onclick: () => { pathFrom = k; panels(); } }));
  to.append(row);
  const names = o ? S[o[1]].split(' ') : [], outs = o ? S[o[2]].split(' ') : [];
  section(to, 'place', table([['line', at(k)], ['library', S[N.user[k]] ? S[N.src[k]] : ''],
                              ['node', String(N.id[k])], ['attributes', S[N.attrs[k]]]]));
  section(to, 'inputs', ...N.in[k].map((v, i) => v < 0 ? null : valueLine(v, (names[i] || '').replace('?', ''))));
  section(to, 'outputs', ...N.out[k].map((v, i) => valueInfo(v, outs[i])));
  section(to, 'cost', table([['arithmetic', heatWords(N.flops[k], 'flops'), 1], ['moved', bytes(N.bytes[k]), 1],
    ['intensity', N.bytes[k] > 0 ? heatWords(heat(k, 'intensity'), 'intensity') : '', 1],
    ['time', N.time[k] >= 0 ? heatWords(N.time[k], 'time') : '', 1],
    ['rate', N.time[k] > 0 && N.flops[k] > 0 ? amount(N.flops[k] / N.time[k] * 1e6) + 'FLOP/s' : '', 1]]));
  const kept = N.home[k] === k ? saved(k) : [];
  section(to, `saved for the backward pass${kept.length ? ', ' + bytes(sumBytes(kept)) : ''}`,
          ...kept.map(v => valueLine(v)));
  const group = attached[N.home[k]];
  section(to, 'backward', ...group.filter(a => N.pass[a] === BACKWARD).map(a => { const d = el('div'); d.append(goNode(a)); return d; }));
  section(to, 'optimizer', ...group.filter(a => N.pass[a] === UPDATE).map(a => { const d = el('div'); d.append(goNode(a)); return d; }));
  const used = N.out[k].flatMap(v => readers[v]).filter(x => N.home[x] !== N.home[k] || N.home[k] !== k);
  section(to, 'read by', ...[...new Set(used)].slice(0, 30).map(a => { const d = el('div'); d.append(goNode(a)); return d; }));
}
/* What keeps a box from being folded with the numbered one before it: the first node that differs. */
function differs(b) {
  const stem = x => S[B.name[x]].replace(/\d+$/, ''), up = B.parent[b];
  if (up < 0 || stem(b) === S[B.name[b]]) return '';
  const boxes = B.items[up].flatMap(x => x[0] === BOX ? [x[1]]
    : x[0] === RUN ? B.child[up].slice(x[1], x[1] + x[2]) : []);
  const before = boxes[boxes.indexOf(b) - 1];
  if (before === undefined || stem(before) !== stem(b) || B.cls[before] === B.cls[b]) return '';
  const p = [...nodesOf(before)], q = [...nodesOf(b)], name = S[B.name[before]];
  for (let i = 0; i < Math.min(p.length, q.length); i++) {
    const x = p[i], y = q[i];
    if (op(x) !== op(y)) return `not as ${name}: ${op(y)} where that has ${op(x)}`;
    if (N.attrs[x] !== N.attrs[y]) return `not as ${name}: ${op(y)} has ${S[N.attrs[y]]}, there ${S[N.attrs[x]]}`;
    for (let o = 0; o < N.out[x].length; o++)
      if (V.shape[N.out[x][o]] !== V.shape[N.out[y][o]])
        return `not as ${name}: ${op(y)} makes ${shapeWords(N.out[y][o])}, there ${shapeWords(N.out[x][o])}`;
  }
  return p.length !== q.length ? `not as ${name}: ${q.length} nodes, there ${p.length}` : `not as ${name}: wired in another way`;
}
const knownParams = new Map();
const paramsOf = b => {
  if (knownParams.has(b)) return knownParams.get(b);
  const path = S[B.path[b]];
  let sum = 0;
  for (let v = 0; v < nValues; v++)
    if (V.kind[v] === 2 && (!path || S[V.name[v]].startsWith(path + '.')))
      sum += S[V.shape[v]].split(',').reduce((p, x) => p * (x === '' ? 1 : +x), 1);
  knownParams.set(b, sum);
  return sum;
};
function boxInfo(to, b) {
  const run = runOf.get(b), count = [0, 1, 2].map(lane => inLaneOf(b, lane));
  to.append(el('span', b ? 'scope' : 'model', { class: 'soft' }));
  to.append(el('h2', b ? S[B.name[b]] : M.model || 'graph'), el('div', S[B.path[b]], { class: 'soft' }));
  if (differs(b)) to.append(el('p', differs(b)));
  const row = el('div', '', { class: 'row' });
  if (b) row.append(el('button', isOpen(b) ? 'close' : 'open', { type: 'button', onclick: () => toggle(b) }));
  row.append(el('button', 'open all inside', { type: 'button', onclick: () => openAll(b, true) }));
  row.append(el('button', 'close all', { type: 'button', onclick: () => openAll(b, false) }));
  to.append(row);
  if (run) {
    const pick = el('select', '', { 'aria-label': 'which of the equal blocks is shown', id: 'turn' });
    for (let i = 0; i < run[2]; i++) {
      const box = B.items[run[3]].find(x => x[0] === RUN && B.child[run[3]][x[1]] === run[0]);
      pick.append(el('option', S[B.path[B.child[run[3]][box[1] + i]]], { value: String(i) }));
    }
    pick.value = String(run[1]);
    pick.addEventListener('change', () => {
      state.turn.set(key(run[0]), +pick.value);
      const box = B.items[run[3]].find(x => x[0] === RUN && B.child[run[3]][x[1]] === run[0]);
      state.sel = { kind: 'box', ref: B.child[run[3]][box[1] + +pick.value] };
      changed();
    });
    const d = el('label', 'shown: ');
    d.append(pick);
    section(to, `${run[2]} equal blocks, drawn once`, d);
  }
  const lanesUsed = [0, 1, 2].filter(i => count[i]);
  for (const i of lanesUsed) section(to, LANES[i], table([['nodes', count[i].toLocaleString('en'), 1],
    ['arithmetic', heatWords(boxHeat(b, i, 'flops'), 'flops'), 1], ['moved', bytes(boxHeat(b, i, 'bytes')), 1],
    ['time', M.timed ? heatWords(boxHeat(b, i, 'time'), 'time') : '', 1]]));
  const params = paramsOf(b);
  section(to, 'memory', table([['parameters', params ? amount(params) : '', 1],
    ['saved for backward', B.saved[b] ? bytes(B.saved[b]) : '', 1],
    ['recomputed', B.recompute[b] ? 'yes' : '']]));
  if (b) return;
  for (const [i, p] of D.plans.entries()) section(to, D.plans.length > 1 ? `plan, graph ${i + 1}` : 'plan', table([['parameters', bytes(p[3]), 1], ['states', bytes(p[4]), 1],
    ['inputs', bytes(p[5]), 1], ['arena', bytes(p[2]), 1], ['scratch', bytes(p[6]), 1], ['total', bytes(p[7]), 1]]));
  if (D.errors.length) section(to, 'errors', ...D.errors.map(k => link(S[N.error[k]].split('\n')[0],
    () => select('node', k, { reveal: true }))));
  if (D.firstBad >= 0) section(to, 'first value that is not finite', goNode(D.firstBad),
    el('button', 'where it comes from', { type: 'button', onclick: () => {
      state.path = ancestors(D.firstBad);
      select('node', D.firstBad, { reveal: true, path: true });
    } }));
  if (state.heat !== 'none') {
    const top = [...Array(nNodes).keys()].sort((p, q) => heat(q, state.heat) - heat(p, state.heat)).slice(0, 10);
    section(to, 'ten largest, ' + state.heat, ...top.map(k => {
      const d = el('div');
      d.append(goNode(k), el('span', '  ' + heatWords(heat(k, state.heat), state.heat), { class: 'soft' }));
      return d;
    }));
  }
}
function panels() {
  const to = $('info');
  to.replaceChildren();
  if (state.path) {
    section(to, state.path.length ? `path, ${state.path.length} nodes` : 'no path between the two',
      ...state.path.slice(0, 60).map(k => { const d = el('div'); d.append(goNode(k)); return d; }));
  }
  if (D.diff && !state.sel)
    section(to, D.diff.length ? 'differences' : 'no differences', ...D.diff.map(x => {
      const d = el('div'), k = x.slice(2).find(n => n >= 0);
      const mark = ['+', '\u2212', '~', '>'][x[0]] + ' ';
      if (k === undefined) d.append(mark + x[1]);
      else d.append(link(mark + x[1], () => select('node', k, { reveal: true })));
      return d;
    }));
  const s = state.sel;
  if (!s) boxInfo(to, 0);
  else if (s.kind === 'node') nodeInfo(to, s.ref);
  else if (s.kind === 'box') boxInfo(to, s.ref);
  else {
    to.append(el('span', ['value', 'input', 'parameter', 'state'][V.kind[s.ref]], { class: 'soft' }));
    to.append(el('h2', S[V.name[s.ref]] || 'value'), valueInfo(s.ref));
    section(to, 'read by', ...[...new Set(readers[s.ref])].slice(0, 40).map(a => { const d = el('div'); d.append(goNode(a)); return d; }));
  }
  drawLegend();
  drawMemory();
}

function drawLegend() {
  const to = $('legend');
  to.replaceChildren();
  LANES.forEach((name, i) => { if (M.has[i]) to.append(el('p', name, { class: 'lane ' + HUE[i] })); });
  if (M.has[1]) {
    const p = el('p'); p.append(el('span', '', { class: 'dots' }), 'kept for the backward pass');
    to.append(p);
    if (D.recomputed) { const q = el('p'); q.append(el('span', '', { class: 'dash' }), 'computed again'); to.append(q); }
  }
  if (state.heat === 'none') return;
  const s = el('div', '', { class: 'scale', id: 'scale' });
  to.append(el('p', state.heat + ', logarithmic', { class: 'soft' }));
  s.append(el('span', heatWords(range[0], state.heat), { id: 'low' }), el('i'),
           el('span', heatWords(range[1], state.heat), { id: 'high' }));
  to.append(s);
}

/* ---- the tree on the left: what is open, for the keyboard and for readers of the screen ------- */

function tree() {
  const to = $('tree'), rows = document.createDocumentFragment();
  let n = 0;
  const row = (words, depth, kind, ref, expandable, open, strong) => {
    if (n++ >= 3000) return;
    const e = el('div', '', { role: 'treeitem', 'aria-level': depth + 1, tabindex: -1,
      'data-kind': kind, 'data-ref': ref, style: `padding-left:${8 + depth * 14}px` });
    e.append(el('span', expandable ? (open ? '\u25be' : '\u25b8') : '', { class: 'twist', 'aria-hidden': 'true' }),
             el(strong ? 'b' : 'span', words));
    if (expandable) e.setAttribute('aria-expanded', String(open));
    const chosen = state.sel && state.sel.kind === kind && state.sel.ref === ref;
    e.setAttribute('aria-selected', String(Boolean(chosen)));
    rows.append(e);
  };
  const visit = (b, depth) => {
    for (const item of B.items[b]) {
      const inner = shown(b, item);
      if (inner >= 0) {
        row(boxName(b, item), depth, 'box', inner, true, isOpen(inner), true);
        if (isOpen(inner)) visit(inner, depth + 1);
      } else if (item[0] === NODE) row(op(item[1]) + (label(item[1]) ? '  ' + label(item[1]) : ''), depth, 'node',
                                       item[1], false, false);
      else row(S[item[0] === INPUT ? V.name[item[1]] : D.outputs[item[1]][1]], depth, 'value',
               item[0] === INPUT ? item[1] : D.outputs[item[1]][0], false, false);
    }
  };
  visit(0, 0);
  to.replaceChildren(rows);
  const first = to.querySelector('[aria-selected=true]') || to.firstElementChild;
  if (first) first.tabIndex = 0;
}
$('tree').addEventListener('click', e => {
  const row = e.target.closest('[role=treeitem]');
  if (!row) return;
  const kind = row.dataset.kind, ref = +row.dataset.ref;
  if (e.target.closest('.twist') && kind === 'box') { toggle(ref); return; }
  select(kind, ref, { reveal: true, stay: true });
});
function onTree(e) {
  const row = document.activeElement, kind = row.dataset.kind, ref = +row.dataset.ref;
  const rows = [...$('tree').children], i = rows.indexOf(row);
  const go = j => { if (rows[j]) { row.tabIndex = -1; rows[j].tabIndex = 0; rows[j].focus(); } };
  const again = () => { const q = $('tree').querySelector(`[data-kind=${kind}][data-ref="${ref}"]`); if (q) q.focus(); };
  if (e.key === 'ArrowDown') go(i + 1);
  else if (e.key === 'ArrowUp') go(i - 1);
  else if (e.key === 'Home') go(0);
  else if (e.key === 'End') go(rows.length - 1);
  else if (e.key === 'ArrowRight' && kind === 'box') { if (isOpen(ref)) go(i + 1); else { toggle(ref, true); again(); } }
  else if (e.key === 'ArrowLeft') {
    if (kind === 'box' && isOpen(ref)) { toggle(ref, false); again(); }
    else for (let j = i; j >= 0; j--) if (+rows[j].ariaLevel < +row.ariaLevel) { go(j); break; }
  } else if (e.key === 'Enter' || e.key === ' ') { select(kind, ref, { reveal: true, stay: true }); tree(); again(); }
  else return false;
  return true;
}

/* ---- memory plan ----------------------------------------------------------------------------- */

const mc = $('memory-canvas'), mg = mc.getContext('2d');
const KINDS = [['parameters', 'pill-line'], ['states', 'pill-line'], ['temporary', 'f'], ['saved for backward', 'k'],
               ['gradients', 'b'], ['update', 'u']];
let mem = { from: 0, to: 1, rects: [] };
const rects = [];
let lastId = 1, firstBackward = -1, arenaBytes = 1;
for (let k = 0; k < nNodes; k++) {
  lastId = Math.max(lastId, N.id[k]);
  if (N.pass[k] === BACKWARD && firstBackward < 0) firstBackward = N.id[k];
}
D.byId = new Map();
for (let k = 0; k < nNodes; k++) D.byId.set(N.id[k], k);
for (const p of D.plans) arenaBytes = Math.max(arenaBytes, p[2]);
for (let v = 0; v < nValues; v++) {
  if (V.offset[v] < 0 || V.maker[v] < 0) continue;
  const pass = N.pass[V.maker[v]];
  const kind = pass === UPDATE ? 5 : pass === BACKWARD ? 4 : firstBackward >= 0 && V.to[v] >= firstBackward ? 3 : 2;
  rects.push({ v, kind, from: V.from[v], to: V.to[v] + 1, low: V.offset[v], high: V.offset[v] + V.bytes[v] });
}
mem.to = lastId + 1;
function memoryX(t) { return 64 + (t - mem.from) / (mem.to - mem.from) * (mc.clientWidth - 76); }
let drawnMemory = '';
function drawMemory() {
  $('memory').hidden = !state.memory;
  if (!state.memory) { drawnMemory = ''; return; }
  const ratio = window.devicePixelRatio || 1, w = mc.clientWidth, h = mc.clientHeight;
  const now = JSON.stringify([state.sel, w, h, ratio, mem.from, mem.to, document.documentElement.dataset.theme]);
  if (now === drawnMemory) return;
  drawnMemory = now;
  mc.width = w * ratio; mc.height = h * ratio;
  mg.setTransform(ratio, 0, 0, ratio, 0, 0);
  mg.fillStyle = colors.panel; mg.fillRect(0, 0, w, h);
  const top = 26, bottom = h - 24, y = b => bottom - b / arenaBytes * (bottom - top);
  mem.y = y;
  mg.font = '600 12px ' + FONT; mg.fillStyle = colors.ink; mg.textAlign = 'left';
  mg.fillText('memory plan', 10, 16);
  mg.font = '11px ' + FONT;
  let x = 112;
  for (let i = 2; i < 6; i++) {
    if (!rects.some(r => r.kind === i)) continue;
    mg.fillStyle = rgba(KINDS[i][1], 0.75); mg.fillRect(x, 8, 10, 10);
    mg.fillStyle = colors.soft; mg.fillText(KINDS[i][0], x + 15, 17);
    x += 30 + mg.measureText(KINDS[i][0]).width;
  }
  mg.textAlign = 'right';
  mg.fillText(`peak ${bytes(arenaBytes)}`, w - 10, 17);
  for (let i = 0; i <= 2; i++) mg.fillText(bytes(arenaBytes * i / 2), 58, y(arenaBytes * i / 2) + (i ? 9 : 0));
  mg.save();
  mg.beginPath(); mg.rect(64, top - 2, w - 76, bottom - top + 4); mg.clip();
  const chosen = state.sel && state.sel.kind === 'node' ? new Set(N.out[state.sel.ref].map(v => V.root[v])) : new Set();
  mem.rects = [];
  for (const r of rects) {
    const x0 = memoryX(r.from), x1 = memoryX(r.to);
    if (x1 < 64 || x0 > w - 12) continue;
    const wide = Math.max(x1 - x0, 0.4), tall = Math.max(y(r.low) - y(r.high), 0.4);
    mg.fillStyle = rgba(KINDS[r.kind][1], chosen.has(r.v) ? 1 : 0.62);
    mg.fillRect(x0, y(r.high), wide, tall);
    if (wide > 4 && tall > 4) { mg.strokeStyle = colors.panel; mg.lineWidth = 0.6; mg.strokeRect(x0, y(r.high), wide, tall); }
    if (chosen.has(r.v)) { mg.strokeStyle = colors.mark; mg.lineWidth = 2; mg.strokeRect(x0, y(r.high), wide, tall); }
    mem.rects.push({ ...r, x0, x1: x0 + wide, y0: y(r.high), y1: y(r.high) + tall });
  }
  mg.restore();
  mg.setLineDash([6, 4]); mg.strokeStyle = rgba('x', 0.8); mg.lineWidth = 1;
  mg.beginPath(); mg.moveTo(64, y(arenaBytes)); mg.lineTo(w - 12, y(arenaBytes)); mg.stroke();
  mg.setLineDash([]);
  if (state.sel && state.sel.kind === 'node') {
    const q = memoryX(N.id[state.sel.ref] + 0.5);
    mg.strokeStyle = colors.mark; mg.lineWidth = 1.2;
    mg.beginPath(); mg.moveTo(q, top - 4); mg.lineTo(q, bottom + 5); mg.stroke();
  }
  drawStrip(w, h, bottom);
}
/* Under the rectangles: which scope the nodes belong to, on the same axis. */
let strip = null;
function makeStrip() {
  const top = new Map();
  const scopeOf = b0 => {
    if (top.has(b0)) return top.get(b0);
    const list = [];
    for (let b = b0; b > 0; b = B.parent[b]) list.unshift(b);
    let i = 0;
    while (i + 1 < list.length && !runOf.has(list[i]) && B.end[list[i]] - B.first[list[i]] > nNodes / 3) i++;
    top.set(b0, list[i] || 0);
    return list[i] || 0;
  };
  const order = [...Array(nNodes).keys()].sort((p, q) => N.id[p] - N.id[q]);
  strip = [];
  for (const k of order) {
    const b = scopeOf(N.box[k]), last = strip[strip.length - 1];
    if (last && last.b === b && last.pass === N.pass[k]) last.to = N.id[k] + 1;
    else strip.push({ b, pass: N.pass[k], from: N.id[k], to: N.id[k] + 1 });
  }
}
function drawStrip(w, h, bottom) {
  if (!strip) makeStrip();
  mg.textAlign = 'center'; mg.font = '10px ' + FONT;
  for (const q of strip) {
    const left = Math.max(memoryX(q.from), 64), right = Math.min(memoryX(q.to), w - 12);
    if (right <= left) continue;
    mg.fillStyle = rgba(HUE[q.pass], 0.18 + 0.14 * (q.b % 2));
    mg.fillRect(left, bottom + 5, Math.max(right - left - 0.5, 0.5), 14);
    const name = S[B.name[q.b]];
    if (right - left > 8 && mg.measureText(name).width < right - left - 2) {
      mg.fillStyle = colors.ink; mg.fillText(name, (left + right) / 2, bottom + 16);
    }
  }
}
mc.addEventListener('click', e => {
  const box = mc.getBoundingClientRect(), x = e.clientX - box.left, y = e.clientY - box.top;
  const within = d => mem.rects.filter(q => x >= q.x0 - d && x <= q.x1 + d && y >= q.y0 - d && y <= q.y1 + d).pop();
  const r = within(0) || within(1);
  if (r) select('node', V.maker[r.v], { reveal: true });
});
mc.addEventListener('mousemove', e => {
  const box = mc.getBoundingClientRect(), x = e.clientX - box.left, y = e.clientY - box.top;
  const r = mem.rects.filter(q => x >= q.x0 && x <= q.x1 && y >= q.y0 && y <= q.y1).pop();
  mc.title = r ? `${op(V.maker[r.v])} ${label(V.maker[r.v])}  ${bytes(V.bytes[r.v])}, ${r.from} to ${r.to - 1}, ${KINDS[r.kind][0]}` : '';
});
mc.addEventListener('wheel', e => {
  e.preventDefault();
  const box = mc.getBoundingClientRect(), u = (e.clientX - box.left - 64) / (mc.clientWidth - 76);
  const span = Math.max(4, Math.min(lastId + 1, (mem.to - mem.from) * Math.exp(e.deltaY * 0.002)));
  const t = mem.from + u * (mem.to - mem.from);
  mem.from = Math.max(0, Math.min(lastId + 1 - span, t - u * span));
  mem.to = mem.from + span;
  drawMemory();
}, { passive: false });

/* ---- search ---------------------------------------------------------------------------------- */

let index = null, found = [], chosenHit = 0;
function search(words) {
  if (!index) {
    index = [];
    for (let b = 1; b < nBoxes; b++) if (B.end[b] > B.first[b]) index.push(['box', b, (S[B.path[b]]).toLowerCase()]);
    for (let k = 0; k < nNodes; k++) {
      const v = N.out[k][0];
      const params = N.in[k].filter(x => x >= 0 && V.name[x]).map(x => S[V.name[x]]).join(' ');
      index.push(['node', k, `${op(k)} ${S[B.path[N.box[k]]]} ${params} ${v === undefined ? '' :
        S[V.dtype[v]] + ' ' + S[V.shape[v]].replace(/,/g, 'x')} ${at(k)}`.toLowerCase()]);
    }
  }
  const parts = words.toLowerCase().replace(/\u00d7/g, 'x').split(/\s+/).filter(Boolean);
  found = [];
  if (parts.length)
    for (const x of index) {
      if (parts.every(p => x[2].includes(p))) found.push(x);
      if (found.length >= 200) break;
    }
  const first = parts[0] || '';
  const rank = x => x[0] === 'box' ? (S[B.name[x[1]]].toLowerCase() === first ? 0 : 2)
                                   : op(x[1]).toLowerCase() === first ? 1 : 3;
  found.sort((p, q) => rank(p) - rank(q));
  chosenHit = 0;
  showHits();
}
function showHits() {
  const to = $('hits');
  to.hidden = $('search').value.trim() === '';
  to.replaceChildren(...found.slice(0, 60).map((x, i) => {
    const li = el('li', '', { role: 'option', 'aria-selected': String(i === chosenHit), id: 'hit' + i });
    if (x[0] === 'box') li.append(el('b', S[B.path[x[1]]]), el('small', '  scope'));
    else li.append(el('span', op(x[1]), { class: 'lane ' + HUE[N.pass[x[1]]] }),
                   el('small', '  ' + [label(x[1]), S[B.path[N.box[x[1]]]]].filter(Boolean).join('  ')));
    li.addEventListener('click', () => goHit(i));
    return li;
  }));
  if (!found.length) to.append(el('li', 'nothing found', { class: 'soft' }));
  $('search').setAttribute('aria-activedescendant', found.length ? 'hit' + chosenHit : '');
}
function goHit(i) {
  if (!found[i]) return;
  $('hits').hidden = true;
  select(found[i][0], found[i][1], { reveal: true });
}
$('search').addEventListener('input', e => search(e.target.value));
$('search').addEventListener('focus', e => { if (e.target.value) search(e.target.value); });
$('search').addEventListener('keydown', e => {
  if (e.key === 'ArrowDown' || e.key === 'ArrowUp') {
    chosenHit = Math.max(0, Math.min(found.length - 1, chosenHit + (e.key === 'ArrowDown' ? 1 : -1)));
    showHits(); e.preventDefault();
    const li = $('hit' + chosenHit);
    if (li) li.scrollIntoView({ block: 'nearest' });
  } else if (e.key === 'Enter') { goHit(chosenHit); canvas.focus(); e.preventDefault(); }
  else if (e.key === 'Escape') { $('hits').hidden = true; canvas.focus(); }
  e.stopPropagation();
});
document.addEventListener('click', e => { if (!e.target.closest('#find')) $('hits').hidden = true; });

/* ---- pointer and keys ------------------------------------------------------------------------ */

const under = e => {
  const r = canvas.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top;
  for (let i = hits.length - 1; i >= 0; i--) {
    const q = hits[i];
    if (x >= q.x && x <= q.x + q.w && y >= q.y && y <= q.y + q.h) return q;
  }
  return null;
};
let drag = null;
const fingers = new Map();
canvas.addEventListener('pointerdown', e => {
  fingers.set(e.pointerId, e);
  drag = { x: e.clientX, y: e.clientY, far: 0 };
  canvas.setPointerCapture(e.pointerId);
});
canvas.addEventListener('pointermove', e => {
  const before = fingers.get(e.pointerId);
  if (!before) { hover(e); return; }
  if (fingers.size === 2) {
    const other = [...fingers.values()].find(f => f.pointerId !== e.pointerId);
    const d = f => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY);
    const r = canvas.getBoundingClientRect();
    zoom(d(e) / Math.max(d(before), 1), other.clientX - r.left, other.clientY - r.top);
    drag.far = 99;
  } else {
    drag.far += Math.abs(e.clientX - before.clientX) + Math.abs(e.clientY - before.clientY);
    if (drag.far > 4) {
      canvas.classList.add('drag');
      state.x += e.clientX - before.clientX;
      state.y += e.clientY - before.clientY;
      draw();
    }
  }
  fingers.set(e.pointerId, e);
});
canvas.addEventListener('pointerup', e => {
  fingers.delete(e.pointerId);
  canvas.classList.remove('drag');
  if (drag && drag.far <= 4) click(e);
  else save();
  drag = null;
});
canvas.addEventListener('pointercancel', e => { fingers.delete(e.pointerId); });
canvas.addEventListener('pointerleave', () => { $('tip').hidden = true; hovered = -1; draw(); });
function click(e) {
  const q = under(e);
  if (!q) { select(null); tree(); return; }
  if (q.kind === 'node' && (pathFrom >= 0 || (e.shiftKey && state.sel && state.sel.kind === 'node'))) {
    if (pathFrom < 0) pathFrom = state.sel.ref;
    pathTo(q.ref);
    return;
  }
  state.sel = { kind: q.kind, ref: q.ref };
  if (q.kind === 'box') toggle(q.ref);
  else if (q.kind === 'value') select('value', q.ref, { stay: true });
  else select('node', q.ref);
  tree();
}
function hover(e) {
  const q = under(e), tip = $('tip');
  const home = q && q.kind === 'node' ? N.home[q.ref] : -1;
  if (home !== hovered) { hovered = home; draw(); }
  canvas.classList.toggle('over', Boolean(q));
  tip.hidden = !q;
  if (!q) return;
  const lines = q.kind === 'node' ? [op(q.ref) + (label(q.ref) ? '  ' + label(q.ref) : ''),
      N.out[q.ref].map(v => `${S[V.dtype[v]]} ${shapeWords(v)}`).join(', '), S[N.attrs[q.ref]],
      state.heat === 'none' ? heatWords(N.flops[q.ref], 'flops') : heatWords(heat(q.ref, state.heat), state.heat),
      at(q.ref), N.error[q.ref] > 0 ? S[N.error[q.ref]] : '']
    : q.kind === 'box' ? [S[B.path[q.ref]], `${B.end[q.ref] - B.first[q.ref]} nodes`, q.closed ? 'click to open' : 'click to close']
    : [S[V.name[q.ref]] || 'output', `${S[V.dtype[q.ref]]} ${shapeWords(q.ref)}`];
  tip.textContent = lines.filter(Boolean).join('\n');
  const r = canvas.getBoundingClientRect();
  tip.style.left = Math.min(e.clientX - r.left + 14, width - 220) + 'px';
  tip.style.top = Math.min(e.clientY - r.top + 14, height - 90) + 'px';
}
canvas.addEventListener('wheel', e => {
  e.preventDefault();
  const r = canvas.getBoundingClientRect();
  if (e.ctrlKey || !e.shiftKey) zoom(Math.exp(-e.deltaY * 0.0016), e.clientX - r.left, e.clientY - r.top);
  else { state.x -= e.deltaY; draw(); save(); }
}, { passive: false });
canvas.addEventListener('dblclick', e => e.preventDefault());

/* Arrows walk from item to item; the way in and out is Enter and Backspace. */
function walk(dx, dy) {
  const s = state.sel, from = s && hits.find(q => q.kind === s.kind && q.ref === s.ref);
  let best = null, least = Infinity;
  for (const q of hits) {
    if (!from) { if (!best || q.y < best.y) best = q; continue; }
    if (q === from || (q.kind === s.kind && q.ref === s.ref)) continue;
    const vx = q.x + q.w / 2 - from.x - from.w / 2, vy = q.y + q.h / 2 - from.y - from.h / 2;
    const ahead = vx * dx + vy * dy, aside = Math.abs(vx * dy) + Math.abs(vy * dx);
    if (ahead < 2) continue;
    const d = ahead + 2.5 * aside;
    if (d < least) { least = d; best = q; }
  }
  if (!best) return;
  select(best.kind, best.ref, { stay: true });
  tree();
  const cx = best.x + best.w / 2, cy = best.y + best.h / 2;
  if (cx < 40 || cx > width - 40 || cy < 40 || cy > height - 40)
    moveTo(state.x + width / 2 - cx, state.y + height / 2 - cy, state.k);
}
function enter() {
  const s = state.sel;
  if (s && s.kind === 'box') toggle(s.ref);
}
function leave() {
  const s = state.sel;
  if (!s) return;
  const b = s.kind === 'box' ? B.parent[s.ref] : s.kind === 'node' ? N.box[s.ref] : 0;
  if (s.kind === 'box' && isOpen(s.ref)) { toggle(s.ref, false); return; }
  if (b > 0) { select('box', b); tree(); }
}
function twin(lane) {
  const s = state.sel;
  if (!s || s.kind !== 'node') return;
  const home = N.home[s.ref];
  const k = lane === FORWARD ? home : attached[home].find(a => N.pass[a] === lane && !(N.flags[a] & 1));
  if (k !== undefined) { select('node', k, { reveal: true }); tree(); }
}
document.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey || $('help').open) return;
  const tag = document.activeElement ? document.activeElement.tagName : '';
  if (tag === 'INPUT' || tag === 'SELECT') return;
  if (document.activeElement.getAttribute('role') === 'treeitem' && onTree(e)) { e.preventDefault(); return; }
  if (tag === 'BUTTON' && (e.key === 'Enter' || e.key === ' ')) return;
  const act = {
    '/': () => $('search').focus(), '+': () => zoom(1.25), '=': () => zoom(1.25), '-': () => zoom(0.8),
    '0': () => fit(), Escape: () => { pathFrom = -1; select(null); tree(); }, ArrowDown: () => walk(0, 1),
    ArrowUp: () => walk(0, -1), ArrowLeft: () => walk(-1, 0), ArrowRight: () => walk(1, 0), Enter: enter, ' ': enter,
    Backspace: leave, f: () => twin(FORWARD), b: () => twin(BACKWARD), o: () => twin(UPDATE),
    e: () => openAll(state.sel && state.sel.kind === 'box' ? state.sel.ref : 0, true),
    c: () => openAll(state.sel && state.sel.kind === 'box' ? state.sel.ref : 0, false),
    h: () => { setHeat(heats[(heats.indexOf(state.heat) + 1) % heats.length]); $('heat').value = state.heat; changed(); },
    m: () => setMemory(!state.memory), t: () => setTheme(), '?': () => $('help').showModal(),
    p: () => { if (state.sel && state.sel.kind === 'node') { pathFrom = state.sel.ref; panels(); say('now choose the other end'); } }
  }[e.key];
  if (act) { act(); e.preventDefault(); }
});

/* ---- bar, theme, address --------------------------------------------------------------------- */

function say(words) { $('say').textContent = words; }
const prefersDark = matchMedia('(prefers-color-scheme: dark)');
function setTheme(theme) {
  const now = document.documentElement.dataset.theme;
  state.theme = theme === undefined ? (now === 'dark' ? 'light' : 'dark') : theme;
  document.documentElement.dataset.theme = state.theme || (prefersDark.matches ? 'dark' : 'light');
  readColors(); draw(); drawMemory(); save();
}
prefersDark.addEventListener('change', () => { if (!state.theme) setTheme(''); });
function setMemory(on) {
  state.memory = on && D.plans.length > 0;
  $('mem').setAttribute('aria-pressed', String(state.memory));
  drawMemory(); resize(); save();
}
function setLane(i) {
  state.lanes[i] = !state.lanes[i];
  if (!state.lanes.some(Boolean)) state.lanes[i] = true;
  [0, 1, 2].forEach(k => $('lane' + k).setAttribute('aria-pressed', String(state.lanes[k])));
  changed();
}
let saving = 0;
function save() {
  clearTimeout(saving);
  saving = setTimeout(() => {
    const p = new URLSearchParams();
    if (state.open.size) p.set('open', [...state.open].sort().join('|'));
    if (state.turn.size) p.set('turn', [...state.turn].map(([k, i]) => k + '=' + i).join('|'));
    if (state.sel) p.set('sel', state.sel.kind + (state.sel.kind === 'node' ? N.id[state.sel.ref] : state.sel.ref));
    if (state.heat !== 'none') p.set('heat', state.heat);
    if (state.theme) p.set('theme', state.theme);
    if (!state.lanes.every(Boolean)) p.set('lanes', state.lanes.map(Number).join(''));
    if (state.memory !== (M.memory && D.plans.length > 0 && innerWidth > 900)) p.set('memory', Number(state.memory));
    p.set('at', [state.x / state.k, state.y / state.k, state.k].map(x => x.toFixed(3)).join(','));
    history.replaceState(null, '', '#' + p);
  }, 120);
}
function load() {
  const p = new URLSearchParams(location.hash.slice(1));
  const list = s => (s || '').split('|').filter(Boolean);
  if (p.has('open')) state.open = new Set(list(p.get('open')));
  for (const x of list(p.get('turn'))) {
    const i = x.lastIndexOf('=');
    if (i > 0) state.turn.set(x.slice(0, i), Math.max(0, parseInt(x.slice(i + 1), 10) || 0));
  }
  const sel = /^(node|box|value)(\d+)$/.exec(p.get('sel') || '');
  if (sel) {
    const ref = sel[1] === 'node' ? D.byId.get(+sel[2]) : +sel[2];
    if (ref !== undefined && ref < { node: nNodes, box: nBoxes, value: nValues }[sel[1]]) state.sel = { kind: sel[1], ref };
  }
  if (heats.includes(p.get('heat'))) state.heat = p.get('heat');
  if (/^[01]{3}$/.test(p.get('lanes') || '')) state.lanes = [...p.get('lanes')].map(x => x === '1');
  if (!state.lanes.some(Boolean)) state.lanes = [true, true, true];
  if (p.has('memory')) state.memory = p.get('memory') === '1' && D.plans.length > 0;
  state.theme = ['dark', 'light'].includes(p.get('theme')) ? p.get('theme') : '';
  const where = (p.get('at') || '').split(',').map(Number);
  return where.length === 3 && where.every(Number.isFinite) && where[2] > 0 ? where : null;
}
function resize() {
  const ratio = window.devicePixelRatio || 1, r = $('map').getBoundingClientRect();
  width = r.width; height = r.height;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  drawMemory();
  draw();
}

/* The first view: what only wraps one thing is open, and what --depth asks for. */
function openFirst() {
  const depth = M.depth;
  if (M.focus >= 0) { turnTo(M.focus); for (let b = M.focus; b > 0; b = B.parent[b]) state.open.add(key(b)); }
  if (depth >= 0) {
    const visit = (b, d) => { for (const item of B.items[b]) {
      const inner = shown(b, item);
      if (inner < 0 || d > depth || B.made[inner]) continue;
      state.open.add(key(inner)); visit(inner, d + 1);
    } };
    visit(0, 1);
    return;
  }
  let visible = B.items[0].length, list = [0];
  while (list.length) {
    const b = list.shift();
    for (const item of B.items[b]) {
      const inner = shown(b, item);
      if (inner < 0 || item[0] === RUN || B.made[inner] || visible + B.items[inner].length > 24) continue;
      visible += B.items[inner].length;
      state.open.add(key(inner));
      list.push(inner);
    }
  }
}

D.errors = []; D.firstBad = -1; D.recomputed = false;
for (let k = 0; k < nNodes; k++) {
  if (N.error[k] > 0) D.errors.push(k);
  if (N.flags[k] & 1) D.recomputed = true;
  if (D.firstBad < 0 && N.out[k].some(v => D.stats[V.stats[v]] && D.stats[V.stats[v]][4])) D.firstBad = k;
}
$('title').textContent = M.model || 'graph';
document.title = (M.model || 'graph') + ' - fox-graph';
for (const h of heats) $('heat').append(el('option', h === 'none' ? 'no heat' : h, { value: h }));
openFirst();
if (D.errors.length) reveal('node', D.errors[0]);
const where = load();
setHeat(state.heat);
$('heat').value = state.heat;
$('heat').addEventListener('change', e => { setHeat(e.target.value); changed(); });
$('fit').addEventListener('click', () => fit());
$('all').addEventListener('click', () => { openAll(0, true); fit(); });
$('none').addEventListener('click', () => { openAll(0, false); fit(); });
$('mem').addEventListener('click', () => setMemory(!state.memory));
$('mem').hidden = !D.plans.length;
$('theme').addEventListener('click', () => setTheme());
$('about').addEventListener('click', () => $('help').showModal());
$('enough').addEventListener('click', () => $('help').close());
[0, 1, 2].forEach(i => {
  $('lane' + i).hidden = !M.has[i] || M.has.filter(Boolean).length < 2;
  $('lane' + i).setAttribute('aria-pressed', String(state.lanes[i]));
  $('lane' + i).addEventListener('click', () => setLane(i));
});
$('mem').setAttribute('aria-pressed', String(state.memory));
document.documentElement.dataset.theme = state.theme || (prefersDark.matches ? 'dark' : 'light');
readColors();
$('memory').hidden = !state.memory;
if (!state.sel && D.errors.length) state.sel = { kind: 'node', ref: D.errors[0] };
layout();
mark();
panels();
tree();
resize();
if (where) { state.k = where[2]; state.x = where[0] * where[2]; state.y = where[1] * where[2]; }
else if (D.errors.length) { fit(true); center('node', D.errors[0]); }
else if (M.focus > 0) { fit(true); center('box', M.focus); }
else fit(true);
drawNow();
new ResizeObserver(resize).observe($('map'));
window.addEventListener('hashchange', () => {
  state.open = new Set(); state.turn = new Map(); state.sel = null; state.path = null;
  const w = load();
  if (!location.hash) openFirst();
  setHeat(state.heat); $('heat').value = state.heat;
  layout(); mark();
  if (w) { state.k = w[2]; state.x = w[0] * w[2]; state.y = w[1] * w[2]; } else fit(true);
  setTheme(state.theme);
  panels(); tree(); draw();
});
/* For tests and for the console. */
window.fox = {
  data: D, state, ready: performance.now(), frame: () => frameTime, redraw: () => { drawNow(); return frameTime; },
  hits: () => hits.map(q => ({ ...q })), rects: () => mem.rects, range: () => range, heat, boxHeat, isOpen, differs, hovered: () => hovered,
  box: path => paths.get(path), toggle, select, openAll, findPath, marks: () => [...marks.keys()]
};
document.documentElement.dataset.ready = '1';
})();
