"""The ``kvfs`` command."""

from __future__ import annotations

import logging
import os

import click

import kvfs
from kvfs.cli import compact, doctor, evict, explain, fsck, inspect, maintain, mount, quality, quarantine, setup, sim
from kvfs.cli.boundary import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(kvfs.__version__, message="%(prog)s %(version)s")
def kvfs_command() -> None:
    """KV caches of language models as files: a text is prefilled once, and every engine maps the result."""
    level = os.environ.get("KVFS_LOG_LEVEL", "warning").upper()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if level in logging.getLevelNamesMapping():
        logging.getLogger("kvfs").setLevel(level)


for command in (
    setup.init,
    mount.mount,
    mount.umount,
    mount.reload,
    inspect.status,
    inspect.ls,
    inspect.show,
    inspect.ns,
    explain.explain,
    maintain.verify,
    fsck.fsck,
    quality.quality,
    quarantine.quarantine,
    maintain.retire,
    evict.evict,
    compact.compact,
    evict.pin,
    evict.unpin,
    sim.sim,
    doctor.doctor,
    setup.config_group,
    setup.vllm_config,
    setup.completion,
):
    kvfs_command.add_command(command)


def main() -> None:
    """Run the command line; never returns."""
    kvfs_command(prog_name="kvfs")
