"""`pfstorer-rt inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from pfstorer_rt.console import counted, echo

NETWORKS = {
    "unet": "UNet",
    "vae": "autoencoder",
    "structure_encoder": "structure encoder",
    "text_encoder": "prompt encoder",
    "cfw": "feature wrapping",
}
PRIORS = {
    "none": "none",
    "start": "start of the training of a person",
    "instant": "learns a person without training",
}
"""Kind of prior -> text."""
LOSSES = {
    "lambda_gen": "L_gen",
    "lambda_pers": "L_pers",
    "lambda_pixel": "pixel error",
    "lambda_color": "colours",
    "lambda_perceptual": "ST-LPIPS",
    "lambda_id": "identity",
    "lambda_face": "face features",
}
"""Weight of a loss -> name of the loss. The weight of L_diff is always 1."""


@click.command()
@click.argument("path", metavar="FILE")
@click.option("-v", "--verbose", is_flag=True, help="Print all values except tensors and settings.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(path: str, verbose: bool, as_json: bool) -> None:
    """Show a summary of a base directory, an identity file or a plan, and check that it is complete.

    \b
    Examples:
      pfstorer-rt inspect alice.plan
      pfstorer-rt inspect portrait --json
    """
    from pfstorer_rt.runtime.describe import describe

    print_report(describe(path), verbose, as_json)


def print_report(report: dict[str, Any], verbose: bool = False, as_json: bool = False) -> None:
    """Print a description as a summary, as all values without long lists, or as JSON."""
    if as_json:
        echo(json.dumps(report))
    elif verbose:
        _print_level({k: v for k, v in report.items() if k not in ("tensors", "settings", "config")}, "")
        if "tensors" in report:
            echo(f"tensors: {len(report['tensors'])} (--json lists them and the settings)")
    else:
        lines = {"base": base_lines, "identity": identity_lines, "plan": plan_lines}[report["type"]](report)
        width = max(map(len, lines)) + 1
        for key, value in lines.items():
            echo(f"{key + ':':<{width}} {value}")


def base_lines(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the summary of a base: name -> text."""
    config, parameters, training = report["config"], report["parameters"], report["personalization"]
    tile, factor = config["tile"], config["factor"]
    side, networks = tile // factor, sorted(parameters, key=parameters.get, reverse=True)
    losses = [f"{name} {training[key]:g}" for key, name in LOSSES.items() if training[key]]
    share = training["first_step"]
    return {
        "base": config["name"],
        "folder": report["folder"],
        "licence": config["licence"],
        "size on disk": megabytes(report["bytes"]),
        "parameters": f"{millions(sum(parameters.values()))} million: "
        + ", ".join(f"{NETWORKS.get(name, name)} {millions(parameters[name])}" for name in networks),
        "tile": f"{tile} x {tile} pixels, in latent space {side} x {side} (factor {factor})",
        "sampler": f"{config['sampler']}, steps: {config['steps']}",
        "personalization": f"{training['train']['iterations']} iterations of "
        f"{counted(training['train']['batch'], 'sample')}, "
        f"learning rate {training['train']['learning_rate']:g}, after {len(config['layers'])} attention layers",
        "loss weights": f"L_diff 1, {', '.join(losses)}"
        + (f"; {share:.0%} of the samples at timestep 999" if share else ""),
        "prior": PRIORS[report["prior"]],
        "fingerprint": report["fingerprint"],
    }


def amount(number: object, noun: str) -> str:
    """Return a number with its noun; the metadata of an identity may lack the number."""
    return counted(number, noun) if isinstance(number, int) else f"an unknown number of {noun}s"


def identity_lines(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the summary of an identity: name -> text."""
    training = report["settings"].get("train")
    training = training if isinstance(training, dict) else {}
    gammas = [values["mean"] for values in report["gamma"].values() if "mean" in values]
    strongest = {"gamma": f"mean {min(gammas):.3g} to {max(gammas):.3g} in {len(gammas)} layers"} if gammas else {}
    return {
        "identity": report["name"],
        "file": report["file"],
        "size": megabytes(report["bytes"]),
        "base": f"{report['base']} (fingerprint {report['base_fingerprint'][:12]})",
        "method": report["method"],
        "photographs": str(len(report["references"])),
        "training": f"{amount(training.get('iterations'), 'iteration')} of {amount(training.get('batch'), 'sample')}",
        **strongest,
        "fingerprint": report["fingerprint"],
    }


def plan_lines(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the summary of a plan: name -> text."""
    identity = f"{report['identity_name']} (method {report['method']})" if report["identity_name"] else "none"
    built_for = f" for {', '.join(report['compute_capabilities'])}" if report["compute_capabilities"] else ""
    runs = "ONNX Runtime, OpenVINO" if report["target"] == "onnx" else report["target"] + built_for
    errors = [payload["parity"]["relative"] for payload in report["payloads"].values() if payload["parity"]]
    return {
        "plan": report["file"],
        "base": f"{report['base_name']} (fingerprint {report['base_fingerprint'][:12]})",
        "identity": identity,
        "licence": report["licence"],
        "size": megabytes(report["bytes"]),
        "runs in": runs,
        "precision": report["precision"],
        "largest error": f"{max(errors):.1e} standard deviations of PyTorch's output" if errors else "not measured",
        "tile": f"{report['tile']} x {report['tile']} pixels",
        "sampler": f"{report['sampler']}, steps: {report['steps']}",
        **({"strength": "adjustable" if report["strength"] else "fixed"} if report["identity_name"] else {}),
        "trusted": trust(report),
    }


def trust(report: Mapping[str, Any]) -> str:
    """Return whether a plan is run without `--trust-plan`, and why."""
    if not report["trusted"]:
        return "no: it contains code, and was not built by you on this machine"
    return "yes: it contains no code" if report["target"] == "onnx" else "yes: it was built by you on this machine"


def megabytes(count: int) -> str:
    """Return a number of bytes in megabytes, or kilobytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def millions(count: int) -> str:
    """Return a number in millions with two digits after the point."""
    return f"{count / 1e6:.2f}"


def _print_level(values: dict[str, Any], indent: str) -> None:
    for key, value in values.items():
        if key == "layers" and isinstance(value, dict) and value:
            kinds = ", ".join(f"{n} {k}" for k, n in value.items())
            echo(f"{indent}layers: {sum(value.values())}: {kinds}")
        elif isinstance(value, dict):
            echo(f"{indent}{key}:")
            _print_level(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            echo(f"{indent}{key}: {text}")
