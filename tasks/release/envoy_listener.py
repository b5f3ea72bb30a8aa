"""What Envoy is started with: admin page, listener, its bounds against hostile clients, what it counts. Pure.

bootstrap.json        once, at the start of Envoy
sds/certificate.json  where the certificate lies; only where TLS is on
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from tasks.release.envoy import (
    API_KEY_FILTER,
    CLIENT_HEADER,
    CLUSTERS,
    LIMIT_FILTER,
    REPLAYED_HEADER,
    REQUEST_SECONDS,
    ROUTE_NAME,
    ROUTES,
    TYPE,
    Json,
    address,
    text_of,
)
from tasks.spec.settings import Settings

BOOTSTRAP, CERTIFICATE = "bootstrap.json", "sds/certificate.json"
ADMIN, ROUTER = "admin", f"{TYPE}extensions.filters.http.router.v3.Router"
STAT_PREFIX, SECRET_NAME = "gateway", "gateway"
# The admin page can stop Envoy, so it never leaves this machine, whatever the listener's host is.
ADMIN_HOST = "127.0.0.1"
MAX_CONNECTIONS = 10_000
MAX_HEAP_BYTES = 1 << 30
MAX_HEADER_KIB, MAX_HEADERS = 16, 100
HEADER_SECONDS = 10
# Of a connection's bytes, how many Envoy holds before it stops reading from the faster side.
BUFFER_BYTES = 1 << 20
# Histograms are folded this often: a canary's judge sees an answer no later.
FLUSH_SECONDS = 0.25
LATENCY_EDGES_MS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700)
# The last one holds whatever is longer: Envoy tells no count above it.
LATENCY_EDGES_MS += (1000, 2000, 5000, 10_000, 30_000, 3_600_000)


def render_bootstrap(settings: Settings, folder: Path) -> str:
    """Return the static file that Envoy is started with; ``folder`` holds all its files."""
    return text_of(
        {
            "node": {"id": "drydock-gateway", "cluster": "drydock"},
            "admin": {"address": address(ADMIN_HOST, settings.gateway_admin_port)},
            "dynamic_resources": {"cds_config": _watched(folder / CLUSTERS)},
            "static_resources": {"listeners": [_listener(settings, folder)], **_admin_door(settings, folder)},
            "overload_manager": _overload_manager(),
            "stats_config": {"histogram_bucket_settings": [_latency_buckets()]},
            "stats_flush_interval": f"{FLUSH_SECONDS}s",
        }
    )


def _admin_door(settings: Settings, folder: Path) -> Json:
    """Return what lets others ask the harmless part of the admin page, where they are told to at another address."""
    if not settings.gateway_admin_at:
        return {}
    port = urlsplit(settings.gateway_admin_at).port
    manager = {
        "@type": f"{TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "statistics",
        "route_config": {"virtual_hosts": [{"name": "statistics", "domains": ["*"], "routes": _admin_routes()}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": ROUTER}}],
        **_path_rules(),
        **_bounds(),
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    door = {"name": "statistics", "address": address(settings.host, port), "filter_chains": [{"filters": filters}]}
    page = {"endpoint": {"address": address(ADMIN_HOST, settings.gateway_admin_port)}}
    endpoints = {"cluster_name": ADMIN, "endpoints": [{"lb_endpoints": [page]}]}
    return {
        "listeners": [_listener(settings, folder), door],
        "clusters": [{"name": ADMIN, "type": "STATIC", "load_assignment": endpoints}],
    }


def _admin_routes() -> list[Json]:
    """The rest of the admin page can stop Envoy, or tell its keys."""
    paths = [("GET", "/ready"), ("GET", "/stats"), ("GET", "/stats/prometheus"), ("POST", "/reopen_logs")]
    method = lambda name: [{"name": ":method", "string_match": {"exact": name}}]  # noqa: E731
    return [{"match": {"path": path, "headers": method(name)}, "route": {"cluster": ADMIN}} for name, path in paths]


def render_certificate(settings: Settings) -> str:
    """Return the file that names the certificate. Envoy reads both again when either is replaced by a rename."""
    pair = {
        "certificate_chain": {"filename": settings.tls_certificate},
        "private_key": {"filename": settings.tls_key},
    }
    kind = f"{TYPE}extensions.transport_sockets.tls.v3.Secret"
    return text_of({"resources": [{"@type": kind, "name": SECRET_NAME, "tls_certificate": pair}]})


def _watched(path: Path) -> Json:
    source = {"path": str(path), "watched_directory": {"path": str(path.parent)}}
    return {"path_config_source": source, "resource_api_version": "V3"}


def _listener(settings: Settings, folder: Path) -> Json:
    chain: Json = {"filters": [_connection_manager(folder, bool(settings.api_keys))]}
    if settings.tls_certificate:
        chain |= {"transport_socket": _tls(folder), "transport_socket_connect_timeout": f"{HEADER_SECONDS}s"}
    return {
        "name": "gateway",
        "address": address(settings.host, settings.gateway_port),
        # A second gateway on this port must fail at start, not silently take half of the connections.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [chain],
    }


def _tls(folder: Path) -> Json:
    secret = {"name": SECRET_NAME, "sds_config": _watched(folder / CERTIFICATE)}
    context = {
        "@type": f"{TYPE}extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "tls_certificate_sds_secret_configs": [secret],
            "alpn_protocols": ["h2", "http/1.1"],
        },
    }
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _connection_manager(folder: Path, keyed: bool) -> Json:
    manager = {
        "@type": f"{TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "rds": {"route_config_name": ROUTE_NAME, "config_source": _watched(folder / ROUTES)},
        "http_filters": _http_filters(keyed),
        "early_header_mutation_extensions": [_forged_headers()],
        "access_log": [_access_log(folder / "access.log")],
        "local_reply_config": _local_replies(),
        "server_header_transformation": "PASS_THROUGH",
        "use_remote_address": True,
        **_path_rules(),
        **_bounds(),
    }
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}


def _path_rules() -> Json:
    """One spelling for each path, so that no rule is passed by another spelling."""
    return {
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
    }


def _bounds() -> Json:
    """What a client may take its time for, and how much it may send: 408, 431, 400."""
    return {
        "request_headers_timeout": f"{HEADER_SECONDS}s",
        "request_timeout": f"{REQUEST_SECONDS}s",
        "stream_idle_timeout": f"{REQUEST_SECONDS}s",
        "max_request_headers_kb": MAX_HEADER_KIB,
        "common_http_protocol_options": {
            "idle_timeout": "300s",
            "max_headers_count": MAX_HEADERS,
            # Some servers read x_y as x-y, which would pass what is taken off above.
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http2_protocol_options": {
            "max_concurrent_streams": 100,
            "initial_stream_window_size": 1 << 16,
            "initial_connection_window_size": BUFFER_BYTES,
        },
    }


def _http_filters(keyed: bool) -> list[Json]:
    """All but the last do nothing but where the routes file says so: keys and limits change without a restart.

    Envoy 1.40 calls its filter for keys work in progress, and warns of it in the log; who asks for no key has
    it not in the chain.
    """
    keys = f"{TYPE}extensions.filters.http.api_key_auth.v3.ApiKeyAuth"
    limit = f"{TYPE}extensions.filters.http.local_ratelimit.v3.LocalRateLimit"
    router = {"@type": ROUTER, "suppress_envoy_headers": True}
    asks = [{"name": API_KEY_FILTER, "disabled": True, "typed_config": {"@type": keys}}] if keyed else []
    return [
        *asks,
        {"name": LIMIT_FILTER, "disabled": True, "typed_config": {"@type": limit, "stat_prefix": "limit"}},
        {"name": "envoy.filters.http.router", "typed_config": router},
    ]


def _forged_headers() -> Json:
    """What only this gateway may say is taken off before any route or filter looks at it.

    By x-envoy-retry-on and its like a client would set its own retries and timeouts.
    """
    kind = f"{TYPE}extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
    removals = [{"remove": CLIENT_HEADER}, {"remove": REPLAYED_HEADER}]
    removals += [{"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}}]
    config = {"@type": kind, "mutations": removals}
    return {"name": "envoy.http.early_header_mutation.header_mutation", "typed_config": config}


def _access_log(path: Path) -> Json:
    """One JSON line a request. No field holds a key: neither the headers of keys nor any header by wildcard."""
    fields = {
        "at": "%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "code": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "duration_ms": "%DURATION%",
        "service": "%UPSTREAM_CLUSTER_RAW%",
        "replica": "%UPSTREAM_HOST%",
        "tries": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "passport": "%RESP(X-DRYDOCK-PASSPORT)%",
        "client": f"%REQ({CLIENT_HEADER})%",
        "replayed": f"%REQ({REPLAYED_HEADER})%",
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
    # A path may be long; its beginning tells which one it was.
    where = "%REQ(:PATH):200%"
    known = {
        401: f"{where}: no known API key; send it as x-api-key",
        429: f"{where}: too many requests from this client; ask again after a second",
    }
    mappers = [_reply("EQ", status, message) for status, message in known.items()]
    return {"mappers": [*mappers, _reply("GE", 400, f"{where}: %LOCAL_REPLY_BODY%")]}


def _reply(operator: str, status: int, message: str) -> Json:
    value = {"default_value": status, "runtime_key": f"drydock.local_reply.{status}"}
    return {
        "filter": {"status_code_filter": {"comparison": {"op": operator, "value": value}}},
        "body_format_override": {"json_format": {"error": message}},
    }


def _overload_manager() -> Json:
    """Bounds for the whole process: connections, and then memory. Near its end, new requests get 503."""
    heap = "envoy.resource_monitors.fixed_heap"
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            _monitor(
                "envoy.resource_monitors.global_downstream_max_connections",
                "downstream_connections.v3.DownstreamConnectionsConfig",
                max_active_downstream_connections=MAX_CONNECTIONS,
            ),
            _monitor(heap, "fixed_heap.v3.FixedHeapConfig", max_heap_size_bytes=MAX_HEAP_BYTES),
        ],
        "actions": [
            {"name": f"envoy.overload_actions.{action}", "triggers": [{"name": heap, "threshold": {"value": share}}]}
            for action, share in (("shrink_heap", 0.8), ("stop_accepting_requests", 0.95))
        ],
    }


def _monitor(name: str, kind: str, **config: int) -> Json:
    return {"name": name, "typed_config": {"@type": f"{TYPE}extensions.resource_monitors.{kind}", **config}}


def _latency_buckets() -> Json:
    times = {"safe_regex": {"regex": r"cluster\..*\.upstream_rq_time"}}
    return {"match": times, "buckets": list(LATENCY_EDGES_MS)}
