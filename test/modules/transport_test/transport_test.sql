-- Functions of transport_test.c.  :'module' is the path of the shared library.

CREATE TYPE http_result AS (outcome text, status int, content_type text, retry_after_ms bigint,
    date bigint, total_ms bigint, error text, body text, longest_run_ms float8);

CREATE FUNCTION http_configure(ca text, cert text DEFAULT NULL, key text DEFAULT NULL, networks text DEFAULT NULL) RETURNS void
    AS :'module', 'http_configure' LANGUAGE C;

CREATE FUNCTION http_request(method text, url text, body bytea DEFAULT NULL,
    content_type text DEFAULT NULL, content_encoding text DEFAULT NULL, bearer text DEFAULT NULL,
    idempotency_key text DEFAULT NULL, reason text DEFAULT NULL, traceparent text DEFAULT NULL,
    connect_ms int DEFAULT 5000, request_ms int DEFAULT 30000, max_response int DEFAULT 1048576)
    RETURNS http_result AS :'module', 'http_request' LANGUAGE C;

-- n requests at once; how many of each outcome
CREATE FUNCTION http_parallel(url text, n int, request_ms int DEFAULT 30000)
    RETURNS text[] AS :'module', 'http_parallel' LANGUAGE C STRICT;

-- n requests, cancelled after ms milliseconds; how many had been accepted, found by cancel, and answered
CREATE FUNCTION http_cancel(url text, n int, ms int) RETURNS int[]
    AS :'module', 'http_cancel' LANGUAGE C STRICT;

-- the query gives seq, id, op, entity_type, entity_id, branch_id, created_at, reason, actor,
-- payload, resolution; with an error for each event that was refused
CREATE FUNCTION wire_body(query text, level int DEFAULT 0, lane text DEFAULT 'high',
    epoch text DEFAULT '00000000-0000-4000-8000-000000000001', epoch_no int DEFAULT 1,
    OUT body bytea, OUT raw_len bigint, OUT nevents int, OUT encoding text, OUT errors text[])
    AS :'module', 'wire_body' LANGUAGE C STRICT;

CREATE FUNCTION wire_key(query text, epoch text DEFAULT '00000000-0000-4000-8000-000000000001',
    lane text DEFAULT 'high') RETURNS text AS :'module', 'wire_key' LANGUAGE C STRICT;

CREATE FUNCTION wire_receipt(body bytea, ids uuid[], OUT ok bool, OUT accepted int, OUT duplicates int,
    OUT error text, OUT verdicts text[]) AS :'module', 'wire_receipt' LANGUAGE C STRICT;

CREATE FUNCTION wire_problem(body bytea, content_type text) RETURNS text
    AS :'module', 'wire_problem' LANGUAGE C;

CREATE FUNCTION wire_traceparent(trace_id bytea) RETURNS text
    AS :'module', 'wire_traceparent' LANGUAGE C STRICT;

-- n events of a given payload, encoded so often; milliseconds of all
CREATE FUNCTION wire_speed(n int, payload text, level int DEFAULT 0) RETURNS float8
    AS :'module', 'wire_speed' LANGUAGE C STRICT;
