// The mask: what is painted on the canvas is the component's value, as the address of a PNG, or "" if nothing is.
const canvas = () => element.querySelector("canvas");
const tool = (name) => element.querySelector(`[name=${name}]`);
let last = null;

function position(event) {
  const box = canvas().getBoundingClientRect();
  const scale = canvas().width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function paint(event) {
  const pen = canvas().getContext("2d");
  const here = position(event);
  pen.globalCompositeOperation = tool("erase").checked ? "destination-out" : "source-over";
  pen.strokeStyle = "#f97316";
  pen.lineCap = "round";
  pen.lineWidth = Number(tool("size").value);
  pen.beginPath();
  pen.moveTo(...(last || here));
  pen.lineTo(...here);
  pen.stroke();
  last = here;
}

element.addEventListener("pointerdown", (event) => {
  if (event.target !== canvas()) return;
  event.preventDefault();
  canvas().setPointerCapture(event.pointerId);
  paint(event);
});
element.addEventListener("pointermove", (event) => last && paint(event));
for (const name of ["pointerup", "pointercancel"]) {
  element.addEventListener(name, () => {
    if (last) props.value = canvas().toDataURL("image/png");
    last = null;
  });
}
element.addEventListener("click", (event) => {
  if (event.target.name !== "clear") return;
  canvas().getContext("2d").clearRect(0, 0, canvas().width, canvas().height);
  props.value = "";
});
