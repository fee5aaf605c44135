// Draws the charts and shows the group of layers that the reader chooses. What comes of the model is set as text only.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const charts = read("page-charts");
const data = read("page-data");
const views = {};

await Promise.all(
  Object.entries(charts).map(async ([name, chart]) => {
    chart.datasets = { [name]: data[name] };
    const options = { renderer: "svg", actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
    views[name] = (await window.vegaEmbed(`#chart-${name}`, chart, options)).view;
  }),
);

const select = document.getElementById("group");

function show(id) {
  select.value = id;
  for (const name of ["overview", "channels", "losses"]) views[name]?.signal("group", id).runAsync();
  const group = data.groups[id];
  const bins = document.getElementById("bins");
  if (!bins) return;
  bins.textContent = group.width > 1 ? `; the largest of ${group.width} neighbours each` : "";
  const shown = ({ activation, scale }) => [activation, scale, activation / scale].map((number) => number.toPrecision(3));
  document.getElementById("loudest").replaceChildren(...group.loudest.map((one) => row([one.index, ...shown(one)])));
}

function row(cells) {
  const tr = document.createElement("tr");
  for (const cell of cells) {
    const td = tr.insertCell();
    td.className = "n";
    td.textContent = cell;
  }
  return tr;
}

if (select) {
  const step = (by) => show((Number(select.value) + by + data.groups.length) % data.groups.length);
  select.addEventListener("change", () => show(Number(select.value)));
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  views.overview?.addSignalListener("pick", (_, picked) => picked.id && show(picked.id[0]));
  const loudest = (data.overview ?? []).reduce((most, one) => (most?.before >= one.before ? most : one), undefined);
  show(loudest?.id ?? 0);
}

// Charts are as wide as their place, on paper too.
for (const event of ["beforeprint", "afterprint"]) {
  window.addEventListener(event, () => window.dispatchEvent(new Event("resize")));
}
document.documentElement.dataset.ready = "true";
