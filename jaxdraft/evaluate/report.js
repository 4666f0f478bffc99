/* The sample viewer: fills four lists of choices and shows the answer that is chosen. All text goes in as text. */
const data = JSON.parse(document.getElementById("viewer-data").textContent);
const viewer = document.getElementById("viewer");
const part = (name) => viewer.querySelector(`[data-part="${name}"]`);
const choice = { task: part("task"), draft: part("draft"), size: part("size"), prompt: part("prompt") };

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/* Gives a list new options and keeps what was chosen where it still is one. */
function fill(list, options, chosen) {
  list.replaceChildren(...options.map(([value, label]) => new Option(label, value)));
  const wanted = options.some(([value]) => String(value) === chosen) ? chosen : options[0]?.[0];
  list.value = wanted;
}

function blockOf([drafted, kept, accepted, refused, own], number) {
  const made = element("span", "block", "");
  const bonus = kept === drafted;
  const end = bonus ? "and one more from the target" : "then the target's own";
  const whole = `draft tokens accepted, ${end}`;
  const cut = "draft tokens stand here; the answer ends inside the block";
  made.title = `block ${number + 1}: ${kept} of ${drafted} ${own === null ? cut : whole}`;
  if (accepted) made.append(element("span", "d", accepted));
  if (refused !== null) made.append(element("del", "r", refused.replaceAll("\n", "⏎")));
  if (own) made.append(element("span", bonus ? "b" : "o", own));
  return made;
}

function show() {
  const prompts = data.prompts[choice.task.value];
  fill(choice.prompt, Object.keys(prompts).map((id) => [id, id]), choice.prompt.value);
  const key = [choice.draft.value, choice.task.value, choice.size.value, choice.prompt.value].join("/");
  part("text").textContent = prompts[choice.prompt.value] ?? "";
  const found = data.answers[key];
  if (!found) {
    part("answer").replaceChildren("This draft was not measured in this setting.");
    part("counts").textContent = "";
    return;
  }
  const [blocks, tokens, before] = found;
  part("answer").replaceChildren(...blocks.map(blockOf));
  const earlier = before === null ? "" : ` The draft before distillation needed ${before} runs.`;
  const rate = (tokens / Math.max(1, blocks.length)).toFixed(2);
  part("counts").textContent = `${tokens} tokens in ${blocks.length} target runs, ${rate} per run.${earlier}`;
}

const numbered = (names) => names.map((name, place) => [place, name]);
fill(choice.task, numbered(data.tasks));
fill(choice.draft, numbered(data.drafts), String(data.best));
fill(choice.size, data.sizes.map((size) => [size, `γ = ${size}`]), String(data.sizes.at(-1)));
for (const list of Object.values(choice)) list.addEventListener("change", show);
part("bounds").addEventListener("change", (event) => {
  part("answer").classList.toggle("bounds", event.target.checked);
});
show();
viewer.hidden = false;
document.getElementById("samples-without-script").hidden = true;
