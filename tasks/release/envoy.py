"""The gateway's state as the files that Envoy reads again at each change. Pure: the same state, the same bytes.

    cds/clusters.json  one cluster a service
    rds/routes.json    the paths of each workload; read by name ``workloads``

What Envoy is started with is in ``envoy_listener``. Field names:
https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/api
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from typing import Any

from tasks.release.model import Backend, GatewayState, Replay, Route
from tasks.spec.value import sha256_of

CLUSTERS, ROUTES, ROUTE_NAME = "cds/clusters.json", "rds/routes.json", "workloads"
TYPE = "type.googleapis.com/envoy."
API_KEY_FILTER, LIMIT_FILTER = "envoy.filters.http.api_key_auth", "envoy.filters.http.local_ratelimit"
CLIENT_HEADER, TOKEN_HEADER, REPLAYED_HEADER = "x-drydock-client", "x-drydock-replay", "x-drydock-replayed"
REQUEST_SECONDS, TRY_SECONDS, GET_TRY_SECONDS = 60, 30, 5
# Shorter than the five seconds after which some servers close an idle connection: a request that meets that
# close fails, and a POST must not be sent twice.
KEEPALIVE_SECONDS = 4
# Streamed, never held; each server has a lower bound of its own. It ends at the first line what no server takes.
MAX_BODY_BYTES = 64 << 20
# The clients whose rate is remembered, for each route; the one longest unseen is forgotten first.
MAX_LIMITED_CLIENTS = 10_000
# A POST may be sent again only where the first server can't have begun to work on it.
SAFE_RETRY = "connect-failure,refused-stream,reset-before-request"
# A connection that the pool keeps may be dead already: a host that restarted. Its first try is not wasted.
IDEMPOTENT_RETRY = f"{SAFE_RETRY},reset,gateway-error"

Json = dict[str, Any]
# Client name -> key. None: the gateway asks for no key.
ApiKeys = Mapping[str, str] | None


def render(state: GatewayState, keys: ApiKeys = None) -> dict[str, str]:
    """Return the files that change with the state and the keys: relative path -> text."""
    return {CLUSTERS: render_clusters(state), ROUTES: render_routes(state, keys)}


def union(clusters: str, on_disk: str | None) -> str:
    """Return the clusters file with those added that only the file on disk has: its routes may name them."""
    if on_disk is None:
        return clusters
    new = json.loads(clusters)
    names = {cluster["name"] for cluster in new["resources"]}
    extra = [cluster for cluster in json.loads(on_disk)["resources"] if cluster["name"] not in names]
    revision = new["version_info"].partition("-")[0]
    return _versioned(revision, new["resources"] + extra)


def render_clusters(state: GatewayState) -> str:
    backends = {name: b for workload in sorted(state.routes) for name, b in state.routes[workload].services.items()}
    clusters = [_cluster(backends[name]) for name in sorted(backends)]
    return _response(state, "config.cluster.v3.Cluster", clusters)


def render_routes(state: GatewayState, keys: ApiKeys = None) -> str:
    return _response(state, "config.route.v3.RouteConfiguration", [_route_configuration(state, keys)])


def version_of(rendered: str) -> str:
    """Return the version that Envoy shows once it has loaded a rendered file."""
    return str(json.loads(rendered)["version_info"])


def text_of(data: Json) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _response(state: GatewayState, kind: str, resources: list[Json]) -> str:
    return _versioned(state.revision, [{"@type": f"{TYPE}{kind}", **resource} for resource in resources])


def _versioned(revision: int | str, resources: list[Json]) -> str:
    # The revision alone would let a file of an interrupted change pass for the one that came after it.
    return text_of({"version_info": f"{revision}-{sha256_of(resources)[:12]}", "resources": resources})


# --- clusters ----------------------------------------------------------------------------------------------


def _cluster(backend: Backend) -> Json:
    hosts = [endpoint.rpartition(":")[0].strip("[]") for endpoint in backend.endpoints]
    ports = [int(endpoint.rpartition(":")[2]) for endpoint in backend.endpoints]
    addresses = [{"endpoint": {"address": address(*pair)}} for pair in zip(hosts, ports, strict=True)]
    limits = {"max_connections": 1024, "max_pending_requests": 1024, "max_requests": 1024, "max_retries": 16}
    return {
        "name": backend.service,
        "type": "STATIC" if all(map(_is_address, hosts)) else "STRICT_DNS",
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": backend.service, "endpoints": [{"lb_endpoints": addresses}]},
        "circuit_breakers": {"thresholds": [limits]},
        "outlier_detection": _outlier_detection(),
        "upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 30}},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{TYPE}extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": f"{KEEPALIVE_SECONDS}s"},
            }
        },
    }


def _outlier_detection() -> Json:
    """Eject a replica that can't be reached, never one that answers 503: that one is busy, and ejecting it
    would send its load to the others, which are busy too."""
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 3,
        "enforcing_consecutive_5xx": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "5s",
        "max_ejection_percent": 50,
    }


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# --- routes ------------------------------------------------------------------------------------------------


def _route_configuration(state: GatewayState, keys: ApiKeys) -> Json:
    workloads = sorted(state.routes)
    routes = [_health(), _too_large()]
    for name in workloads:
        routes += _workload_routes(name, state.routes[name], state.limits.get(name), keys is not None)
    served = ", ".join(name for name in workloads if state.routes[name].backends) or "none"
    routes += [_refusal({"prefix": "/v2/models/"}, 404, f"no such workload; this gateway serves {served}")]
    message = "no such path; ask /v2/health/live or /v2/models/WORKLOAD/infer"
    routes += [_refusal({"prefix": "/"}, 404, message)]
    # The token opens a door of this gateway only; no server needs to know it.
    host: Json = {"name": "all", "domains": ["*"], "routes": routes, "request_headers_to_remove": [TOKEN_HEADER]}
    if keys is not None:
        host["typed_per_filter_config"] = {API_KEY_FILTER: _api_keys(keys)}
    # What serves behind the gateway is nobody's business.
    return {"name": ROUTE_NAME, "virtual_hosts": [host], "response_headers_to_remove": ["server"]}


def _api_keys(keys: Mapping[str, str]) -> Json:
    """For the whole host, so that without a key not even the workloads' names can be learnt."""
    return {
        "@type": f"{TYPE}extensions.filters.http.api_key_auth.v3.ApiKeyAuthPerRoute",
        "credentials": [{"key": keys[client], "client": client} for client in sorted(keys)],
        # The filter itself takes off the word Bearer.
        "key_sources": [{"header": "x-api-key"}, {"header": "authorization"}],
        "forwarding": {"header": CLIENT_HEADER, "hide_credentials": True},
    }


def _without_key() -> Json:
    return {API_KEY_FILTER: {"@type": f"{TYPE}config.route.v3.FilterConfig", "disabled": True}}


def _health() -> Json:
    return {
        "match": {"path": "/v2/health/live"},
        "direct_response": {"status": 200, "body": {"inline_string": '{"live":true}'}},
        "response_headers_to_add": [_header("content-type", "application/json")],
        "typed_per_filter_config": _without_key(),
    }


def _header(name: str, value: str) -> Json:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _refusal(match: Json, status: int, message: str) -> Json:
    return {"match": match, "direct_response": {"status": status, "body": {"inline_string": message}}}


def _too_large() -> Json:
    length = {"name": "content-length", "range_match": {"start": MAX_BODY_BYTES + 1, "end": (1 << 63) - 1}}
    return _refusal({"prefix": "/", "headers": [length]}, 413, f"the body is over {MAX_BODY_BYTES} bytes, the limit")


def _workload_routes(workload: str, route: Route, limit: int | None, keyed: bool) -> list[Json]:
    """The replay's side door first; then the public's, where there is something for it."""
    # Path-separated: /v2/models/digits and below it, never /v2/models/digits-two.
    path = {"path_separated_prefix": f"/v2/models/{workload}"}
    routes = [_replay_route(path, route.replay)] if route.replay else []
    return routes + _public_routes(path, route, limit, keyed) if route.backends else routes


def _replay_route(path: Json, replay: Replay) -> Json:
    """No key and no limit, and never a shadow: what is replayed is evidence about these backends alone."""
    token = {"name": TOKEN_HEADER, "string_match": {"exact": replay.token}}
    return {
        "match": path | {"headers": [token]},
        "route": _action(replay.backends, SAFE_RETRY, TRY_SECONDS),
        "request_headers_to_add": [_header(REPLAYED_HEADER, "true")],
        "typed_per_filter_config": _without_key(),
    }


def _public_routes(path: Json, route: Route, limit: int | None, keyed: bool) -> list[Json]:
    """Two routes: GET may be tried again after any failure, everything else only where that is safe."""
    get = path | {"headers": [{"name": ":method", "string_match": {"exact": "GET"}}]}
    tries = ((get, IDEMPOTENT_RETRY, GET_TRY_SECONDS), (path, SAFE_RETRY, TRY_SECONDS))
    limited = {"typed_per_filter_config": {LIMIT_FILTER: _limit(limit, keyed)}} if limit else {}
    mirrored = {"request_mirror_policies": [_mirror(route.shadow)]} if route.shadow else {}
    return [
        {"match": m, "route": _action(route.backends, on, seconds) | mirrored} | limited for m, on, seconds in tries
    ]


def _mirror(shadow: Backend) -> Json:
    """Envoy sends the copy by itself: the public answer waits for nothing, and the copy's answer is counted."""
    share = {"default_value": {"numerator": shadow.weight, "denominator": "HUNDRED"}}
    return {"cluster": shadow.service, "runtime_fraction": share, "disable_shadow_host_suffix_append": True}


def _limit(requests_per_second: int, keyed: bool) -> Json:
    """A bucket for each client. A client with an address range of its own has one bucket, not 2^64.

    GET and the rest are two routes and have a bucket each, so asking whether a model is ready costs no
    inference. A client that can't be told apart, which is none, would share one bucket of that size.
    """
    bucket = {"max_tokens": requests_per_second, "tokens_per_fill": requests_per_second, "fill_interval": "1s"}
    by_key = {"request_headers": {"header_name": CLIENT_HEADER, "descriptor_key": "client"}}
    by_address = {"masked_remote_address": {"v4_prefix_mask_len": 32, "v6_prefix_mask_len": 64}}
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    # An entry without a value stands for each value, with a bucket of its own.
    client = {"key": "client" if keyed else "masked_remote_address"}
    return {
        "@type": f"{TYPE}extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "limit",
        "token_bucket": bucket,
        "filter_enabled": always,
        "filter_enforced": always,
        "rate_limits": [{"actions": [by_key if keyed else by_address]}],
        "descriptors": [{"entries": [client], "token_bucket": bucket}],
        "always_consume_default_token_bucket": False,
        "max_dynamic_descriptors": MAX_LIMITED_CLIENTS,
        "response_headers_to_add": [_header("retry-after", "1")],
    }


def _action(backends: tuple[Backend, ...], retry_on: str, try_seconds: int) -> Json:
    return _destination(backends) | {
        "timeout": f"{REQUEST_SECONDS}s",
        "retry_policy": {
            "retry_on": retry_on,
            "num_retries": 2,
            "per_try_timeout": f"{try_seconds}s",
            "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
            "retry_host_predicate": [_previous_hosts()],
            "host_selection_retry_max_attempts": 3,
        },
    }


def _previous_hosts() -> Json:
    kind = "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    return {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {"@type": f"{TYPE}{kind}"}}


def _destination(backends: tuple[Backend, ...]) -> Json:
    if len(backends) == 1:
        return {"cluster": backends[0].service}
    shares = [{"name": backend.service, "weight": backend.weight} for backend in backends]
    return {"weighted_clusters": {"clusters": shares}}
