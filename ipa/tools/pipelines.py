"""Public pipelines for options of `ipa.tools.sample`: image to image, inpainting, structure controls, schedulers."""

from __future__ import annotations

import functools
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
from PIL import Image

from ipa.contracts import Family
from ipa.errors import UserError, brief
from ipa.prompter import Prompter
from ipa.references import open_image
from ipa.sampling import SamplingOptions

FLOW = "FlowMatch"  # begins the names of the schedulers for rectified flow
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("start_image", "inpaint", "control", "control_model")),
    **dict.fromkeys(("scheduler", "width", "height", "num_steps")),
    "strength": 0.8,
    "control_weight": 1.0,
}


def check_pipeline(settings: dict[str, Any]) -> None:
    """Raise UserError for options that need others, and for images that do not exist."""
    if (settings["control"] is None) != (settings["control_model"] is None):
        raise UserError("control= and control_model=: give both or neither")
    if settings["inpaint"] and not settings["start_image"]:
        raise UserError("inpaint=: give start_image=, the picture that is painted on")
    for name in ("control", "start_image", "inpaint", "mask"):
        if settings[name] is not None and not Path(settings[name]).is_file():
            raise UserError(f"{name}={settings[name]}: no such file")
    if settings["scheduler"]:
        scheduler_class(settings["scheduler"])


def make_pipeline(prompter: Prompter, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call; ``options`` are those in ``OPTIONS``, as in `ipa.tools.sample`."""
    if unknown := options.keys() - OPTIONS.keys():
        raise UserError(f"{', '.join(sorted(unknown))} is none of {', '.join(OPTIONS)}")
    settings = OPTIONS | options
    pipeline, parts, arguments = with_control(prompter, settings)
    if "adapter_conditioning_scale" in arguments and settings["start_image"]:
        raise UserError("start_image=: diffusers starts from an image with a ControlNet, but not with a T2I-Adapter")
    num_steps = settings["num_steps"] or prompter.defaults.get("num_steps", SamplingOptions.num_steps)
    if settings["start_image"]:
        strength = settings["strength"]
        if int(num_steps * strength) < 1:
            raise UserError(f"strength={strength} num_steps={num_steps}: strength × num_steps is at least 1")
        task = "inpaint" if settings["inpaint"] else "start_image"
        pipeline = pipeline_for(task, prompter.family).from_pipe(pipeline, **parts)
        if parts:
            arguments["control_image"] = arguments.pop("image")
        arguments |= {"image": read(prompter, settings, "start_image"), "strength": settings["strength"]}
        if settings["inpaint"]:
            unet = getattr(pipeline, "unet", None)  # transformers inpaint with any number of channels
            if unet is not None and (channels := unet.config.in_channels) not in (4, 9):
                raise UserError(f"inpaint=: diffusers needs a base of 4 or 9 input channels, this one has {channels}")
            arguments["mask_image"] = read(prompter, settings, "inpaint")
    elif parts:
        pipeline = pipeline_for("control", prompter.family).from_pipe(pipeline, **parts)
    if settings["scheduler"]:
        set_scheduler(pipeline, settings["scheduler"], num_steps)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments


def pipeline_for(task: str, family: Family) -> Any:
    """The class; raises UserError if diffusers has none."""
    if task not in family.task_pipelines:
        raise UserError(f"{task}=: diffusers has no pipeline that does this with {family.title}")
    return family.task_pipelines[task]


def set_scheduler(pipeline: Any, name: str, num_steps: int) -> None:
    """Raises UserError for a scheduler of other pipelines, or one that cannot make so few steps, as PNDM."""
    flow = type(pipeline.scheduler).__name__.startswith(FLOW)
    scheduler = scheduler_class(name).from_config(pipeline.scheduler.config)
    if not fits(scheduler, name, flow):
        advice = "FlowMatchEulerDiscreteScheduler or FlowMatchLCMScheduler" if flow else "another one"
        raise UserError(f"scheduler={name} is for other pipelines: give {advice}")
    try:
        scheduler.set_timesteps(num_steps, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    except Exception as error:  # each scheduler has its own
        raise UserError(f"scheduler={name} cannot make num_steps={num_steps} ({brief(error)}): give more") from error
    pipeline.scheduler = scheduler


def fits(scheduler: Any, name: str, flow: bool) -> bool:
    if flow:  # the pipelines of transformers give their own noise levels
        return name.startswith(FLOW) and "sigmas" in signature(scheduler.set_timesteps).parameters
    return all(hasattr(scheduler, part) for part in ("init_noise_sigma", "order", "scale_model_input"))


def with_control(prompter: Prompter, settings: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Pipeline, parts that it lacks, and arguments, for a ControlNet, a T2I-Adapter, or neither."""
    if settings["control"] is None:
        return prompter.pipeline(), {}, {}
    if "control" not in prompter.family.task_pipelines:
        raise UserError(
            f"control_model=: this command has no controls for {prompter.family.title}. In Python, give Prompter a "
            "pipeline with a ControlNet, as docs/use.md shows"
        )
    control = load_control(settings["control_model"]).to(prompter.family.device, prompter.family.dtype)
    image, weight = read(prompter, settings, "control"), settings["control_weight"]
    if isinstance(control, diffusers.T2IAdapter):
        pipeline = prompter.pipeline(pipeline_for("t2i_adapter", prompter.family), adapter=control)
        return pipeline, {}, {"image": image, "adapter_conditioning_scale": weight}
    return prompter.pipeline(), {"controlnet": control}, {"image": image, "controlnet_conditioning_scale": weight}


@functools.lru_cache(maxsize=1)  # the page uses the same one for every job
def load_control(path: str) -> Any:
    """A ControlNet or a T2I-Adapter; raises UserError for anything else."""
    try:
        name = diffusers.ControlNetModel.load_config(path).get("_class_name")
        if name not in ("T2IAdapter", "ControlNetModel"):
            raise ValueError(f"it is a {name}")
        return getattr(diffusers, name).from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"control_model={path} is no ControlNet or T2I-Adapter: {brief(error)}") from error


def scheduler_class(name: str) -> Any:
    """A scheduler of diffusers; raises UserError for any other name."""
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin) and hasattr(kind, "from_config")):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler") and "Flax" not in each]
        raise UserError(f"scheduler={name}: give one of {', '.join(known)}")
    return kind


def read(prompter: Prompter, settings: dict[str, Any], name: str) -> Image.Image:
    """A picture at the size of the images; raises UserError if it cannot be read."""
    edge = prompter.family.image_size_px
    return open_image(settings[name], name).resize((settings["width"] or edge, settings["height"] or edge))
