"""Speeds of devices and links of several machines, for placement: each measured where it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from core.cluster.master import Master
from core.cluster.messages import Measure, MeasurePaths
from core.cluster.placed_stage import RemoteStages
from core.config import Settings
from core.costs import DeviceProfile, LinkProfile, LinkTopology
from core.devices import Device, host_of
from core.models.architecture import Architecture
from core.models.resolve import ResolvedModel
from core.network.echo import LinkSpeed
from core.profiling.profiler import LayerProfiler

METHOD = "vtp"


class ClusterProfiler:
    """What `plan_model` asks for speeds: this machine's from `here`, a node's from the node."""

    def __init__(self, here: LayerProfiler, master: Master, resolved: ResolvedModel, settings: Settings) -> None:
        self._here = here
        self._master = master
        self._resolved = resolved
        self._settings = settings

    def devices(self, devices: Sequence[Device], architecture: Architecture) -> tuple[DeviceProfile, ...]:
        """A profile per device, in their order."""
        here = [device for device in devices if device.is_here]
        found = {profile.name: profile for profile in self._here.devices(here, architecture)}
        told = RemoteStages(self._master, self._resolved, architecture, self._settings)
        for there in _by_node(devices):
            node = self._master.node_of(there[0])
            names = tuple(node.devices[device.name].name for device in there)
            answer = node.call(Measure(told.model, names, dict(told.engine)), timeout_s=None)
            for device, profile in zip(there, answer.profiles, strict=True):
                sharing = profile.sharing
                if sharing is not None:  # processors of two machines are two
                    sharing = replace(sharing, processor=f"{device.node}/{sharing.processor}")
                found[device.name] = replace(profile, name=device.name, sharing=sharing)
        return tuple(found[device.name] for device in devices)

    def links(self, devices: Sequence[Device]) -> LinkTopology:
        """Between each two devices; all devices of a node are behind the same link."""
        here = [device for device in devices if device.is_here]
        links = dict(self._here.links(here).links)
        for source, target in itertools.permutations(devices, 2):
            if not (source.is_here and target.is_here):
                links[source.name, target.name] = self._between(source, target)
        inside: dict[tuple[str, str], LinkProfile] = {}
        for there in _by_node(devices):
            if len(there) > 1:
                inside |= self._inside(there)
        return LinkTopology(links, inside=inside)

    def host_links(self, devices: Sequence[Device]) -> dict[tuple[str, str], LinkProfile]:
        """From each machine's main memory to its devices."""
        found = self._here.host_links([device for device in devices if device.is_here])
        for there in _by_node(devices):
            host = host_of(there[0].name)
            found |= {pair: link for pair, link in self._inside(there).items() if pair[0] == host}
        return found

    def _inside(self, there: Sequence[Device]) -> dict[tuple[str, str], LinkProfile]:
        """Between devices of a node, and from its main memory to them."""
        node = self._master.node_of(there[0])
        names = tuple(node.devices[device.name].name for device in there)
        paths = node.call(MeasurePaths(names), timeout_s=None).paths
        return {(f"{node.name}/{path.source}", f"{node.name}/{path.target}"): path.link for path in paths}

    def _between(self, source: Device, target: Device) -> LinkProfile:
        if source.is_here or target.is_here:
            speed = self._master.node_of(target if source.is_here else source).speed
        else:
            speed = self._master.node_of(source).reach(self._master.node_of(target))
        return _profile(speed)


def _by_node(devices: Sequence[Device]) -> list[list[Device]]:
    """Devices of other machines, those of a machine together."""
    found: dict[str, list[Device]] = {}
    for device in devices:
        if not device.is_here:
            found.setdefault(device.node, []).append(device)
    return list(found.values())


def _profile(speed: LinkSpeed) -> LinkProfile:
    return LinkProfile(max(1.0, speed.bandwidth_bytes_s), speed.latency_s, METHOD)
