"""The claims of the paper (Ye et al. 2023), and what is measured for each. Sections 9 to 11 are in ``more``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from demo.paper.claims import Chart, Comparison, Group, Section
from demo.paper.measuring import Ask
from demo.paper.plan import NUMBERS, POINTS, STYLES, TRAIN, Settings, number_of_images

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ALONE = "λ = 0 (the base alone)"
BACKGROUND_SHARE = "share of images with the image prompt's background"


def group(settings: Settings, system: str, **options: object) -> Group:
    """A system that is trained with every seed, each with its own noise."""
    name, at, point = system.partition("@")
    return tuple(Ask(f"{name}-{seed}{at}{point}", seed=seed, **options) for seed in settings.seeds)  # type: ignore[arg-type]


def frozen(settings: Settings) -> Section:
    return Section(
        1,
        "Twenty-two million parameters suffice, and the base stays as it was",
        "22 M trained parameters; the base model is frozen.",
        "Parameters are counted at full size (Stable Diffusion 1.5, OpenCLIP ViT-H/14) without weights, and on the "
        "files trained here. The base is compared before and after ten training steps by the SHA-256 of its weights, "
        "and by its images with the adapter installed at λ = 0 and removed. Below: empty text, λ = 1.",
        {
            "decoupled, global": group(settings, "global"),
            "decoupled, fine-grained": group(settings, "fine"),
            ALONE: group(settings, "global", scale=0.0),
        },
        ("clip_i",),
        strip=["decoupled, global", ALONE],
        listed=["decoupled, global", "decoupled, fine-grained"],
    )


def followed(settings: Settings) -> Section:
    every = max(1, settings.steps // POINTS)
    steps = range(every, settings.steps, every)
    rows = {"λ = 1": group(settings, "global"), ALONE: group(settings, "global", scale=0.0)}
    curve = {f"after {step} steps": group(settings, f"global@{step}") for step in steps}
    line = [*((float(step), f"after {step} steps") for step in steps), (float(settings.steps), "λ = 1")]
    return Section(
        2,
        "The image prompt is followed",
        "CLIP-I 0.828 and CLIP-T 0.588 with the image prompt alone (Table 1).",
        "Empty text.",
        rows | curve,
        ("retrieval", "clip_i", "clip_t", "style", "background", "border"),
        [
            Comparison(f"{name} with the image prompt", "λ = 1", ALONE, metric)
            for metric, name in {
                "retrieval": "higher retrieval@1",
                "clip_i": "higher CLIP-I",
                "style": "the drawing style is right more often",
                "border": "smaller distance of the border colours",
            }.items()
        ],
        [Chart("CLIP-I over training", "steps", "clip_i", {"λ = 1": line})],
        ["λ = 1", ALONE],
        listed=["λ = 1", ALONE],
    )


def decoupled(settings: Settings) -> Section:
    rows = {
        "decoupled, global": group(settings, "global"),
        "simple, global": group(settings, "simple"),
        "simple, as many parameters": group(settings, "simple_wide"),
        "decoupled, fine-grained": group(settings, "fine"),
        "simple, fine-grained": group(settings, "simple_fine"),
    }
    pairs = {
        "decoupled above simple, equal steps": ("decoupled, global", "simple, global"),
        "decoupled above simple, about equal trained parameters": ("decoupled, global", "simple, as many parameters"),
        "decoupled above simple, fine-grained": ("decoupled, fine-grained", "simple, fine-grained"),
    }
    return Section(
        3,
        "Decoupled cross-attention is above the simple adapter",
        "Decoupled is clearly better, shown by images (Figure 10); both were trained for 200,000 steps.",
        "Empty text, λ = 1. The simple adapter with as many parameters has more image tokens (its head is larger).",
        rows,
        ("clip_i", "clip_t", "retrieval", "style", "border"),
        [Comparison(f"{claim}: CLIP-I", *pair, "clip_i") for claim, pair in pairs.items()],
        strip=list(rows),
    )


def fine_grained(settings: Settings) -> Section:
    names = {**{f"{n} images": f"_{n}" for n in NUMBERS}, "all images": ""}
    heads = {"fine": "fine-grained", "global": "global"}
    rows = {
        f"{title}, {count}": group(settings, f"{head}{suffix}")
        for count, suffix in names.items()
        for head, title in heads.items()
    }
    rows[ALONE] = group(settings, "global", scale=0.0)
    total = float(number_of_images(TRAIN))
    places = {**{f"{n} images": float(n) for n in NUMBERS}, "all images": total}
    lines = {title: [(x, f"{title}, {count}") for count, x in places.items()] for title in heads.values()}
    pair = ("fine-grained, all images", "global, all images")
    charts = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "edges": "Edge overlap with the prompt"}
    return Section(
        4,
        "Fine-grained features: closer to the prompt, and its structure leaks",
        "Fine-grained 0.835 against 0.828 in CLIP-I, 0.579 against 0.588 in CLIP-T; structure leaks (section 4.4.2).",
        f"Empty text, λ = 1; trained on the first 100 or 300 images of the training data, or on all {total:g}, for the "
        "same number of steps.",
        rows,
        ("clip_i", "clip_t", "retrieval", "edges"),
        [
            Comparison("fine-grained above global: CLIP-I", *pair, "clip_i"),
            Comparison("fine-grained below global: CLIP-T", *pair[::-1], "clip_t"),
            Comparison("fine-grained above global: edge overlap with the prompt", *pair, "edges"),
            Comparison("fine-grained above the base alone: edge overlap with the prompt", pair[0], ALONE, "edges"),
            Comparison("global above the base alone: edge overlap with the prompt", pair[1], ALONE, "edges"),
        ],
        [Chart(f"{title} by number of training images", "images", metric, lines) for metric, title in charts.items()],
        list(rows),
    )


def strength(settings: Settings) -> Section:
    rows = {f"λ = {scale:g}": group(settings, "global", scale=scale) for scale in SCALES}
    line = {"decoupled, global": [(scale, f"λ = {scale:g}") for scale in SCALES]}
    return Section(
        5,
        "λ sets the strength of the image prompt",
        "λ weighs the image's attention; λ = 0 is the original model (equation 8).",
        "Empty text.",
        rows,
        ("clip_i", "retrieval", "style", "border"),
        [
            Comparison(
                f"CLIP-I is higher at λ = {high:g} than at λ = {low:g}", f"λ = {high:g}", f"λ = {low:g}", "clip_i"
            )
            for low, high in ((0.0, 0.5), (0.5, 1.0))
        ],
        [
            Chart("CLIP-I against λ", "λ", "clip_i", line),
            Chart("Border distance (ΔE) against λ", "λ", "border", line),
        ],
        list(rows),
    )


def with_text(settings: Settings) -> Section:
    scales = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows = {f"λ = {scale:g}": group(settings, "global", scale=scale, text="other") for scale in scales}
    curve = {"decoupled, global": [(scale, f"λ = {scale:g}") for scale in scales]}
    return Section(
        6,
        "Text and image work together",
        "The text changes attributes and scenes while the look of the image stays (Figure 8).",
        "Each image prompt with the caption of another concept. The text is followed if the judge finds that caption "
        f"among the nearest five of all {settings.items}; the look stays if the background is the image prompt's (of "
        "twelve).",
        rows,
        ("text", "background", "style", "clip_i"),
        [
            Comparison(
                "at λ = 0.5, the background is right more often than by the text alone",
                "λ = 0.5",
                "λ = 0",
                "background",
            ),
            Comparison(
                "at λ = 0.5, the text is followed at least 0.8 times as often as by itself",
                "λ = 0.5",
                "λ = 0",
                "text",
                0.8,
            ),
        ],
        [Chart("Text followed against background right, λ from 0 to 1", BACKGROUND_SHARE, "text", curve, "background")],
        list(rows),
    )


def reuse(settings: Settings) -> Section:
    own = {"own base, λ = 1": group(settings, "global")}
    with_image = {f"{style} base, λ = 1": group(settings, "global", base=style) for style in STYLES}
    without = {f"{style} base, λ = 0": group(settings, "global", base=style, scale=0.0) for style in STYLES}
    texts = {
        f"{name or 'own'} base, a text alone": group(settings, "global", base=name, scale=0.0, text="other")
        for name in ("", *STYLES)
    }
    tests = []
    for style in STYLES:
        text, prompted, alone = (f"{style} base, {what}" for what in ("a text alone", "λ = 1", "λ = 0"))
        drawn = f"{style} base: draws {style} style more often than the demo base"
        tests += [
            Comparison(f"{drawn}, from a text", text, "own base, a text alone", f"drawn_{style}"),
            Comparison(f"{drawn}, from an image prompt", prompted, "own base, λ = 1", f"drawn_{style}"),
            Comparison(f"{style} base: higher CLIP-I with the image prompt", prompted, alone, "clip_i"),
            Comparison(
                f"{style} base: at least 0.9 times the CLIP-I on the demo base",
                prompted,
                "own base, λ = 1",
                "clip_i",
                0.9,
            ),
        ]
    return Section(
        7,
        "One adapter works on custom bases that it never saw",
        "The adapter of SD 1.5 works on community models without further training and takes on their style (Figure 4).",
        "Three copies of the base, each fine-tuned on the images of one drawing style. Empty text, except where texts "
        "alone show what the bases draw. A drawing style is told with the caption of the text, or of the image prompt.",
        own | with_image | without | texts,
        ("clip_i", "retrieval", "style", "border", *(f"drawn_{style}" for style in STYLES)),
        tests,
        strip=[*own, *with_image, *without, *texts],
    )


def structure(settings: Settings) -> Section:
    alone, rows, tests = "image prompt alone", {}, []
    for control, name in (("controlnet", "ControlNet"), ("t2i_adapter", "T2I-Adapter")):
        both, half, edges = f"{name} and image prompt", f"{name} and image prompt, λ = 0.5", f"{name} alone (λ = 0)"
        rows |= {
            both: group(settings, "global", control=control),
            half: group(settings, "global", scale=0.5, control=control),
            edges: group(settings, "global", scale=0.0, control=control),
        }
        tests += [
            Comparison(f"{name}: higher overlap with the control's edges than without them", both, alone, "control"),
            Comparison(f"{name}: background right more often than by the edges alone", both, edges, "background"),
            *(
                Comparison(f"{name}, {at}: keeps at least 0.9 times its own edges", row, edges, "control", 0.9)
                for at, row in (("λ = 1", both), ("λ = 0.5", half))
            ),
        ]
    rows[alone] = group(settings, "global")
    return Section(
        8,
        "Structure control and the image prompt work together",
        "The adapter is compatible with ControlNet and T2I-Adapter (Figures 5 and 6).",
        "A ControlNet and a T2I-Adapter for edges, trained on the base without the adapter, get the edges of another "
        "image prompt. Empty text; λ = 1 where none is given. The row without edges gives the overlap by chance. The "
        "limit of 0.9 is ours.",
        rows,
        ("control", "background", "style", "clip_i"),
        tests,
        strip=list(rows),
    )


def sections_of(settings: Settings) -> list[Section]:
    from demo.paper.more import beyond, drops, systems

    makers: Sequence[Callable[[Settings], Section]] = (
        *(frozen, followed, decoupled, fine_grained, strength, with_text, reuse, structure),
        *(systems, drops, beyond),
    )
    return [make(settings) for make in makers]
