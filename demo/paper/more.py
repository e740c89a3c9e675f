"""Sections 9 to 11: other ways to prompt with an image, the drops, and what the paper does not have."""

from __future__ import annotations

from demo.paper.claims import Comparison, Group, Section, Threshold
from demo.paper.measuring import Ask
from demo.paper.plan import STYLES, Settings, adapters
from demo.paper.sections import group

# title → (name here, λ together with a text; 1 where the system has none)
SYSTEMS = {
    "IP-Adapter, global": ("global_adamw", 0.5),
    "IP-Adapter, fine-grained": ("fine_adamw", 0.5),
    "fine-tuned UNet, image in place of the text (SD Image Variations)": ("variations", 1.0),
    "fine-tuned UNet, noised embedding next to the text (SD unCLIP)": ("unclip", 1.0),
    "global ControlNet (Shuffle)": ("shuffle", 0.5),
    "style adapter (T2I-Adapter)": ("style", 0.5),
    "reference-only": ("reference", 1.0),
}
KEPT, HALF = 0.9, 0.5


def system_asks(name: str, scale: float, settings: Settings) -> dict[str, Group]:
    """Suffix of the row → ask, all with the first seed."""
    seed = settings.seeds[0]
    system = f"{name}-{seed}" if name in adapters() else name
    rows = {
        "": Ask(system, seed=seed),
        ", custom base": Ask(system, base=STYLES[0], seed=seed),
        ", text": Ask(system, scale=scale, text="other", seed=seed),
        ", edges": Ask(system, control="controlnet", seed=seed),
    }
    return {suffix: (ask,) for suffix, ask in rows.items()}


def systems(settings: Settings) -> Section:
    rows = {
        f"{title}{suffix}": asks
        for title, (name, scale) in SYSTEMS.items()
        for suffix, asks in system_asks(name, scale, settings).items()
    }
    ours, _, *others = SYSTEMS
    seed, no_image = settings.seeds[0], "custom base alone"
    rows[no_image] = (Ask(f"global-{seed}", base=STYLES[0], scale=0.0, seed=seed),)
    custom = {
        title: [
            Comparison("at least 0.9 times its own CLIP-I", f"{title}, custom base", title, "clip_i", KEPT),
            Comparison("higher CLIP-I than of that base alone", f"{title}, custom base", no_image, "clip_i"),
        ]
        for title in SYSTEMS
    }
    edges = {
        title: [
            Comparison("the edges are followed", f"{title}, edges", title, "control"),
            Threshold("the image's background in half of the images", f"{title}, edges", "background", HALF),
        ]
        for title in SYSTEMS
    }
    texts = {
        title: [
            Threshold("the text is followed in half of the images", f"{title}, text", "text", HALF),
            Threshold("the image's background in half of the images", f"{title}, text", "background", HALF),
        ]
        for title in SYSTEMS
    }
    return Section(
        9,
        "Above other adapters, near fine-tuned models",
        "Table 1: IP-Adapter 0.828 in CLIP-I and 0.588 in CLIP-T; Uni-ControlNet 0.736, 0.506; T2I style 0.648, 0.485; "
        "ControlNet Shuffle 0.616, 0.421; SD Image Variations 0.760, 0.548; SD unCLIP 0.810, 0.584. Reference-only is "
        "compared by images (section 4.2.2).",
        "All trained from the demo base on the same samples for the same number of steps with AdamW and one seed "
        "(reference-only trains nothing). Empty text, λ = 1. The marks are tests: ✓ all hold, × one is contradicted, "
        "? undecided. On a custom base, fine-tuned UNets have the difference to their base added to its weights. With "
        "the text of another concept, λ is 0.5 where the system has one. Uni-ControlNet is not measured.",
        rows,
        ("clip_t", "clip_i", "retrieval", "background"),
        [Comparison(f"IP-Adapter, global above {title}: CLIP-I", ours, title, "clip_i") for title in others],
        strip=list(SYSTEMS),
        ticks={"reusable on a custom base": custom, "with structure control": edges, "with a text": texts},
        listed=list(SYSTEMS),
    )


def drops(settings: Settings) -> Section:
    names = {
        "no drops": "drops_none",
        "text dropped in 40 %": "drops_text",
        "image dropped in 5 %": "drops_image",
        "text in 40 %, image in 5 %, both in 5 %": "global",
    }
    *others, whole = names
    alone = {title: group(settings, name) for title, name in names.items()}
    both = {
        f"{title}; λ = 0.5 and a text": group(settings, name, scale=0.5, text="other") for title, name in names.items()
    }
    return Section(
        10,
        "Dropping text and image in training",
        "5 % of the texts, 5 % of the images and 5 % of both are dropped for classifier-free guidance (section 4.1.2).",
        f"Guidance {settings.guidance:g}, whose negative part is the empty text without an image. First the image "
        "alone (λ = 1), then λ = 0.5 with the caption of another concept. The recipe drops the text more often than "
        "the paper, since this few steps otherwise rarely train on the image alone.",
        alone | both,
        ("clip_i", "retrieval", "style", "border", "text"),
        [Comparison(f"all drops above {title}: CLIP-I of the image alone", whole, title, "clip_i") for title in others],
        strip=list(alone),
    )


def beyond(settings: Settings) -> Section:
    main = f"global-{settings.seeds[0]}"
    unseen, alone = "unseen style, λ = 1", "unseen style, λ = 0"
    rows: dict[str, Group] = {
        "λ = 1": group(settings, "global"),
        unseen: group(settings, "global", prompts="unseen"),
        alone: group(settings, "global", prompts="unseen", scale=0.0),
    }
    tests = [Comparison("image prompts in an unseen style: higher CLIP-I than at λ = 0", unseen, alone, "clip_i")]
    if settings.own is not None:
        rows["your images, λ = 1"] = (Ask(main, prompts="own", seed=settings.seeds[0]),)
        rows["your images, λ = 0.5 and a text"] = (
            Ask(main, prompts="own", scale=0.5, text="other", seed=settings.seeds[0]),
        )
    own_pairs = "λ = 1 and a text"
    for title, name in (("style pairs", "style_pairs"), ("concept pairs", "concept_pairs")):
        both = f"trained on {title}, {own_pairs}"
        rows |= {f"trained on {title}, λ = 1": group(settings, name), both: group(settings, name, text="other")}
        tests.append(Comparison(f"{title}: the text is followed more often at λ = 1", both, own_pairs, "text"))
    rows[own_pairs] = group(settings, "global", text="other")
    return Section(
        11,
        "Beyond the paper",
        "",
        "Empty text, except where one is named: then the caption of another concept, as in section 6. The unseen style "
        "is that of demo/data/unseen. The prompts of pairs were other images of the same style or concept in training, "
        "which leaves the rest to the text. `own=FOLDER` adds your own images.",
        rows,
        ("clip_i", "clip_t", "retrieval", "style", "background", "text"),
        tests,
        strip=list(rows),
    )
