"""The gateway's state as Envoy's files. Pure: the same state gives the same bytes.

    bootstrap.json   once: admin page, listener, limits, where the other two lie
    cds/clusters.json  one cluster a service
    rds/routes.json    one path a workload; read by name ``workloads``

Field names: https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/api
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

from tasks.release.model import Backend, GatewayState
from tasks.spec.settings import Settings
from tasks.spec.value import sha256_of

CLUSTERS, ROUTES, BOOTSTRAP = "cds/clusters.json", "rds/routes.json", "bootstrap.json"
ROUTE_NAME, STAT_PREFIX = "workloads", "gateway"
# The admin page can stop Envoy, so it never leaves this machine, whatever the listener's host is.
ADMIN_HOST = "127.0.0.1"
TYPE = "type.googleapis.com/envoy."
REQUEST_SECONDS, TRY_SECONDS, GET_TRY_SECONDS = 60, 30, 5
# Shorter than the five seconds after which uvicorn closes an idle connection: a request that meets that
# close fails, and a POST must not be sent twice.
KEEPALIVE_SECONDS = 4
MAX_CONNECTIONS = 10_000
# A POST may be sent again only where the first server can't have begun to work on it.
SAFE_RETRY = "connect-failure,refused-stream,reset-before-request"
# A connection that the pool keeps may be dead already: a host that restarted. Its first try is not wasted.
IDEMPOTENT_RETRY = f"{SAFE_RETRY},reset,gateway-error"

Json = dict[str, Any]


def render(state: GatewayState) -> dict[str, str]:
    """Return the files that change with the state: relative path -> text."""
    return {CLUSTERS: render_clusters(state), ROUTES: render_routes(state)}


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
    backends = {b.service: b for workload in sorted(state.routes) for b in state.routes[workload]}
    clusters = [_cluster(backends[name]) for name in sorted(backends)]
    return _response(state, "config.cluster.v3.Cluster", clusters)


def render_routes(state: GatewayState) -> str:
    return _response(state, "config.route.v3.RouteConfiguration", [_route_configuration(state)])


def version_of(rendered: str) -> str:
    """Return the version that Envoy shows once it has loaded a rendered file."""
    return str(json.loads(rendered)["version_info"])


def render_bootstrap(settings: Settings, folder: Path) -> str:
    """Return the static file that Envoy is started with; ``folder`` holds all its files."""
    return _text(
        {
            "node": {"id": "drydock-gateway", "cluster": "drydock"},
            "admin": {"address": _address(ADMIN_HOST, settings.gateway_admin_port)},
            "dynamic_resources": {"cds_config": _watched(folder / CLUSTERS)},
            "static_resources": {"listeners": [_listener(settings, folder)]},
            "overload_manager": _connection_limit(),
        }
    )


def _response(state: GatewayState, kind: str, resources: list[Json]) -> str:
    return _versioned(state.revision, [{"@type": f"{TYPE}{kind}", **resource} for resource in resources])


def _versioned(revision: int | str, resources: list[Json]) -> str:
    # The revision alone would let a file of an interrupted change pass for the one that came after it.
    return _text({"version_info": f"{revision}-{sha256_of(resources)[:12]}", "resources": resources})


def _text(data: Json) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _watched(path: Path) -> Json:
    source = {"path": str(path), "watched_directory": {"path": str(path.parent)}}
    return {"path_config_source": source, "resource_api_version": "V3"}


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(settings: Settings, folder: Path) -> Json:
    return {
        "name": "gateway",
        "address": _address(settings.host, settings.gateway_port),
        # A second gateway on this port must fail at start, not silently take half of the connections.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": 1 << 20,
        "filter_chains": [{"filters": [_connection_manager(folder)]}],
    }


def _connection_manager(folder: Path) -> Json:
    filters = "extensions.filters.http.router.v3.Router"
    router = {"@type": f"{TYPE}{filters}", "suppress_envoy_headers": True}
    manager = {
        "@type": f"{TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "rds": {"route_config_name": ROUTE_NAME, "config_source": _watched(folder / ROUTES)},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
        "access_log": [_access_log(folder / "access.log")],
        "local_reply_config": _local_replies(),
        "server_header_transformation": "PASS_THROUGH",
        "use_remote_address": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "request_headers_timeout": "10s",
        "stream_idle_timeout": f"{REQUEST_SECONDS}s",
        "common_http_protocol_options": {"idle_timeout": "300s"},
    }
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}


def _access_log(path: Path) -> Json:
    fields = {
        "at": "%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "code": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "duration_ms": "%DURATION%",
        "service": "%UPSTREAM_CLUSTER_RAW%",
        "replica": "%UPSTREAM_HOST%",
        "tries": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "passport": "%RESP(X-DRYDOCK-PASSPORT)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
    }
    config = {
        "@type": f"{TYPE}extensions.access_loggers.file.v3.FileAccessLog",
        "path": str(path),
        "log_format": {"json_format": fields},
    }
    return {"name": "envoy.access_loggers.file", "typed_config": config}


def _local_replies() -> Json:
    """What Envoy itself answers (no such workload, no replica) is JSON as the protocol's errors are."""
    failed = {"op": "GE", "value": {"default_value": 400, "runtime_key": "drydock.local_reply.min_code"}}
    error = {"json_format": {"error": "%REQ(:PATH)%: %LOCAL_REPLY_BODY%"}}
    return {
        "mappers": [{"filter": {"status_code_filter": {"comparison": failed}}, "body_format_override": error}]
    }


def _connection_limit() -> Json:
    name = "envoy.resource_monitors.global_downstream_max_connections"
    kind = "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
    limit = {"@type": f"{TYPE}{kind}", "max_active_downstream_connections": MAX_CONNECTIONS}
    return {"resource_monitors": [{"name": name, "typed_config": limit}]}


def _cluster(backend: Backend) -> Json:
    hosts = [endpoint.rpartition(":")[0].strip("[]") for endpoint in backend.endpoints]
    ports = [int(endpoint.rpartition(":")[2]) for endpoint in backend.endpoints]
    addresses = [{"endpoint": {"address": _address(*pair)}} for pair in zip(hosts, ports, strict=True)]
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


def _route_configuration(state: GatewayState) -> Json:
    workloads = sorted(state.routes)
    routes = [_health()]
    routes += [route for name in workloads for route in _workload_routes(name, state.routes[name])]
    served = ", ".join(workloads) or "none"
    routes += [_not_found("/v2/models/", f"no such workload; this gateway serves {served}")]
    routes += [_not_found("/", "no such path; ask /v2/health/live or /v2/models/WORKLOAD/infer")]
    host = {"name": "all", "domains": ["*"], "routes": routes}
    # What serves behind the gateway is nobody's business.
    return {"name": ROUTE_NAME, "virtual_hosts": [host], "response_headers_to_remove": ["server"]}


def _health() -> Json:
    return {
        "match": {"path": "/v2/health/live"},
        "direct_response": {"status": 200, "body": {"inline_string": '{"live":true}'}},
        "response_headers_to_add": [_header("content-type", "application/json")],
    }


def _header(name: str, value: str) -> Json:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _not_found(prefix: str, message: str) -> Json:
    return {
        "match": {"prefix": prefix},
        "direct_response": {"status": 404, "body": {"inline_string": message}},
    }


def _workload_routes(workload: str, backends: tuple[Backend, ...]) -> list[Json]:
    """Two routes: GET may be tried again after any failure, everything else only where that is safe."""
    # Path-separated: /v2/models/digits and below it, never /v2/models/digits-two.
    match = {"path_separated_prefix": f"/v2/models/{workload}"}
    get = match | {"headers": [{"name": ":method", "string_match": {"exact": "GET"}}]}
    return [
        {"match": get, "route": _action(backends, IDEMPOTENT_RETRY, GET_TRY_SECONDS)},
        {"match": match, "route": _action(backends, SAFE_RETRY, TRY_SECONDS)},
    ]


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
