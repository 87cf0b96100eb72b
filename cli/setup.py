"""What is done once: make a store, see the configuration, connect vLLM and the shell."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvfs import config
from kvfs.cli import options, render
from kvfs.errors import ConfigError


@click.command(short_help="Make a store.")
@click.argument("store", type=click.Path(path_type=Path))
@render.json_option
def init(store: Path, as_json: bool) -> None:
    """Make a store in the folder STORE, which must be empty or absent. A store that is there is left as it is."""
    from kvfs.store import Store

    path = store.absolute()
    existed = (path / "kvfs-store.json").exists()
    Store.init(path).close()
    if as_json:
        render.emit({"store": str(path), "created": not existed})
    else:
        click.echo(f"{path} {'is a store already' if existed else 'is ready'}")


@click.group(name="config", short_help="See the configuration.")
def config_group() -> None:
    """See the configuration: one TOML file, KVFS_* variables, flags; later ones win."""


@config_group.command(name="show", short_help="Print every setting.")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@options.config_option
@render.json_option
def config_show(origin: bool, config_file: Path | None, as_json: bool) -> None:
    """Print every setting as a line of TOML, ready for a configuration file."""
    settings = config.load(config_file)
    if as_json:
        render.emit(
            {
                name: {"value": row.show(getattr(settings, name)) or None, "origin": settings.origins[name]}
                for name, row in config.SETTINGS.items()
            }
        )
        return
    click.echo(config.to_toml(settings, origins=origin), nl=False)


@click.command(name="vllm-config", short_help="Print the --kv-transfer-config value for vLLM.")
@click.option("--mount", "mountpoint", type=click.Path(path_type=Path), metavar="DIR", help="Use a mounted store.")
@click.option("--store", type=click.Path(path_type=Path), metavar="DIR", help="Use a store without a daemon.")
@click.option(
    "--fidelity",
    type=click.Choice(["exact", "lossy"]),
    default="exact",
    help="lossy: KV that was compacted with loss will do; what is computed is kept apart from exact KV.",
)
def vllm_config(mountpoint: Path | None, store: Path | None, fidelity: str) -> None:
    """Print one JSON object for vLLM's --kv-transfer-config, and nothing else.

    vllm serve MODEL --kv-transfer-config "$(kvfs vllm-config --mount /mnt/kvfs)"
    """
    if mountpoint and not store:
        place = {"mount": str(mountpoint.absolute())}
    elif store and not mountpoint:
        place = {"store": str(store.absolute())}
    else:
        raise click.UsageError("give one of --mount DIR and --store DIR")
    lossy = {} if fidelity == "exact" else {"fidelity": fidelity}
    click.echo(
        json.dumps(
            {
                "kv_connector": "KvfsConnector",
                "kv_connector_module_path": "kvfs.vllm_hook.connector",
                "kv_role": "kv_both",
                # vLLM's own default fails the request when a load fails.
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": place | lossy,
            },
            separators=(",", ":"),
        )
    )


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    bash: kvfs completion bash > /etc/bash_completion.d/kvfs
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:  # the choices above are click's own
        raise ConfigError(f"no completion for {shell}")
    click.echo(kind(ctx.find_root().command, {}, "kvfs", "_KVFS_COMPLETE").source())
