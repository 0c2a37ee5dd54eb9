/*
 * The state of each branch at a glance: for the store manager, for headquarters,
 * and for a monitoring system.
 */

CREATE TABLE softmobile.link_state (
	branch_id text COLLATE "C" PRIMARY KEY,
	central_url text,
	state text NOT NULL
		CONSTRAINT state_known CHECK (state IN ('up', 'down', 'unknown', 'not configured', 'inactive')),
	since timestamptz NOT NULL
);
COMMENT ON TABLE softmobile.link_state IS 'What the worker knows of each branch''s link to its central server. Written by the worker when the state changes; not dumped.';
COMMENT ON COLUMN softmobile.link_state.central_url IS 'Base URL that the state is about.';
COMMENT ON COLUMN softmobile.link_state.state IS 'up: the last request was answered (by whatever it was that answered); down: it was not; unknown: there has been none; not configured: no central_url; inactive: the branch is.';

CREATE VIEW softmobile.sync_overview AS
WITH log AS (
	SELECT n.branch_id,
		sum(n.events) AS total,
		coalesce(sum(n.events) FILTER (WHERE n.state = 'p'), 0) AS pending,
		coalesce(sum(n.events) FILTER (WHERE n.state = 'f'), 0) AS failed,
		coalesce(sum(n.amount) FILTER (WHERE n.state <> 's'), 0) AS amount,
		min(n.oldest) FILTER (WHERE n.state <> 's') AS oldest
	FROM softmobile.outbox_counts() n
	GROUP BY n.branch_id
), exception AS (
	SELECT x.branch_id,
		count(*) FILTER (WHERE x.state = 'queued') AS pending,
		count(*) FILTER (WHERE x.state = 'failed') AS failed,
		count(*) FILTER (WHERE x.kind = 'conflict') AS conflicts,
		coalesce(sum(x.amount) FILTER (WHERE x.op <> 'd'), 0) AS amount,
		min(x.created_at) AS oldest,
		(array_agg(x.error_message ORDER BY x.last_attempt_at DESC NULLS LAST) FILTER (WHERE x.state = 'failed'))[1] AS error_message
	FROM softmobile.outbox_exception x
	WHERE x.state IN ('failed', 'queued')
	GROUP BY x.branch_id
), lane AS (
	SELECT l.branch_id,
		max(b.settled_at) AS last_sent_at,
		(array_agg(l.error_message ORDER BY l.last_attempt_at DESC) FILTER (WHERE l.status = 'failed'))[1] AS error_message
	FROM softmobile.outbox_lane l
		LEFT JOIN LATERAL (
			SELECT g.settled_at FROM softmobile.outbox_batch g
			WHERE g.lane_id = l.lane_id AND g.kind = 'sent' ORDER BY g.lane_id DESC, g.batch_id DESC LIMIT 1) AS b ON true
	WHERE l.branch_id IS NOT NULL
	GROUP BY l.branch_id
), link AS (
	SELECT b.branch_id,
		CASE WHEN NOT b.active THEN 'inactive' WHEN w.running THEN coalesce(k.state, 'unknown') ELSE 'unknown' END AS state,
		CASE WHEN w.running AND b.active = (k.state <> 'inactive') THEN k.since END AS since
	FROM softmobile.branch b
		CROSS JOIN softmobile.worker_status() w
		LEFT JOIN softmobile.link_state k USING (branch_id)
), hour AS (
	-- Each settled batch is a request that succeeded; each session that failed ended with one that did not.
	SELECT a.branch_id,
		sum(a.succeeded) AS succeeded,
		sum(a.failed) AS failed,
		sum(a.events) FILTER (WHERE a.at > a.window_start) / extract(epoch FROM statement_timestamp() - min(a.window_start)) * 60 AS events_per_minute
	FROM (
		SELECT l.branch_id, g.settled_at, 1, 0, g.events - g.exceptions,
			least(greatest(statement_timestamp() - interval '5 minutes', k.since), statement_timestamp() - interval '1 second')
		FROM softmobile.outbox_batch g
			JOIN softmobile.outbox_lane l USING (lane_id)
			LEFT JOIN softmobile.link_state k ON k.branch_id = l.branch_id AND k.state = 'up'
		WHERE g.kind = 'sent' AND g.settled_at > statement_timestamp() - interval '1 hour'
		UNION ALL
		SELECT s.branch_id, s.finished_at, 0, 1, 0, NULL
		FROM softmobile.sync_session s
		WHERE s.status = 'failed' AND s.finished_at > statement_timestamp() - interval '1 hour'
	) AS a (branch_id, at, succeeded, failed, events, window_start)
	GROUP BY a.branch_id
)
SELECT b.branch_id,
	k.state AS link_state,
	k.since,
	CASE WHEN n.total > 0 THEN trunc(100 * (n.total - n.pending - n.failed - coalesce(x.pending + x.failed, 0)) / n.total, 2) ELSE 100 END AS percent,
	(coalesce(n.pending, 0) + coalesce(x.pending, 0))::bigint AS pending,
	(coalesce(n.failed, 0) + coalesce(x.failed, 0))::bigint AS failed,
	coalesce(x.conflicts, 0) AS conflicts,
	statement_timestamp() - least(n.oldest, x.oldest) AS oldest_pending_age,
	coalesce(n.amount, 0) + coalesce(x.amount, 0) AS pending_amount,
	round(coalesce(h.events_per_minute, 0), 1) AS events_per_minute,
	round(100.0 * h.succeeded / (h.succeeded + h.failed), 1) AS success_rate,
	CASE WHEN k.state = 'up' AND n.pending + n.failed > 0 AND h.events_per_minute > 0
			AND (n.pending + n.failed) / h.events_per_minute < 5000000 THEN
		statement_timestamp() + ((n.pending + n.failed) / h.events_per_minute)::float8 * interval '1 minute' END AS estimated_completion,
	b.name,
	coalesce(n.total, 0)::bigint AS total,
	l.last_sent_at,
	coalesce(l.error_message, x.error_message) AS error_message
FROM softmobile.branch b
	JOIN link k USING (branch_id)
	LEFT JOIN log n USING (branch_id)
	LEFT JOIN exception x USING (branch_id)
	LEFT JOIN lane l USING (branch_id)
	LEFT JOIN hour h USING (branch_id);
COMMENT ON VIEW softmobile.sync_overview IS 'One row per registered branch: is its link up, what waits (events, money, age), how fast it goes, and until when.';
COMMENT ON COLUMN softmobile.sync_overview.link_state IS 'up: the last request was answered; down: it was not; unknown: no worker runs, or it has not tried yet; not configured: no central_url; inactive: the branch is. An idle link is looked at every softmobile.sync_interval.';
COMMENT ON COLUMN softmobile.sync_overview.since IS 'Since when link_state is so; an outage keeps its beginning when the worker is restarted. NULL: not known.';
COMMENT ON COLUMN softmobile.sync_overview.percent IS 'Part of the kept events (total) that central has, 0 to 100, rounded down.';
COMMENT ON COLUMN softmobile.sync_overview.pending IS 'Events that wait, as in sync_outbox_stats.';
COMMENT ON COLUMN softmobile.sync_overview.oldest_pending_age IS 'Age of the oldest event that central does not have, pending or failed. NULL: central has all.';
COMMENT ON COLUMN softmobile.sync_overview.pending_amount IS 'Sum of the amounts (attach''s amount_column) of the events that central does not have, pending or failed, without deletions; a row that was changed while it waits counts with each change.';
COMMENT ON COLUMN softmobile.sync_overview.events_per_minute IS 'Events delivered per minute, over the last five minutes or since the link came up.';
COMMENT ON COLUMN softmobile.sync_overview.success_rate IS 'Requests of the last hour that succeeded, in percent. NULL: there were none.';
COMMENT ON COLUMN softmobile.sync_overview.estimated_completion IS 'When the queue will be empty at events_per_minute. NULL where that cannot be told: nothing waits, the link is not up, nothing was delivered in the last minutes.';
COMMENT ON COLUMN softmobile.sync_overview.total IS 'Events kept (softmobile.retention), delivered ones included.';
COMMENT ON COLUMN softmobile.sync_overview.last_sent_at IS 'When central last acknowledged a batch.';
COMMENT ON COLUMN softmobile.sync_overview.error_message IS 'Of the latest attempt that failed and is not made good yet.';

CREATE FUNCTION softmobile.metric_family(family text, type text, help text, samples text, unit text DEFAULT NULL) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
RETURN '# TYPE ' || family || ' ' || type || E'\n' || coalesce('# UNIT ' || family || ' ' || unit || E'\n', '')
	|| '# HELP ' || family || ' ' || help || E'\n' || coalesce(samples, '');
COMMENT ON FUNCTION softmobile.metric_family(text, text, text, text, text) IS 'Internal, for metrics(): a metric family with its metadata. The name ends with the unit, if there is one.';

CREATE FUNCTION softmobile.metric_sample(name text, labels text[], value numeric) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
RETURN name || coalesce('{' || (
	SELECT string_agg(labels[i] || '="' || replace(replace(replace(labels[i + 1], '\', '\\'), '"', '\"'), E'\n', '\n') || '"', ',' ORDER BY i)
	FROM generate_series(1, cardinality(labels), 2) AS i) || '}', '') || ' ' || value || E'\n';
COMMENT ON FUNCTION softmobile.metric_sample(text, text[], numeric) IS 'Internal, for metrics(): one line; labels: names and values in turn. NULL where the value is.';

CREATE FUNCTION softmobile.metrics() RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	-- One reading for all, so that the figures agree with each other.
	branches softmobile.sync_overview[] := ARRAY(SELECT o FROM softmobile.sync_overview o ORDER BY o.branch_id);
	answer text := softmobile.metric_family('softmobile', 'info', 'Version of the extension.',
			(SELECT softmobile.metric_sample('softmobile_info', ARRAY['version', e.extversion], 1) FROM pg_extension e WHERE e.extname = 'softmobile'))
		|| softmobile.metric_family('softmobile_worker_running', 'gauge', 'Whether the worker of this database is running.',
			(SELECT softmobile.metric_sample('softmobile_worker_running', NULL, w.running::integer) FROM softmobile.worker_status() w));
BEGIN
	RETURN answer
		|| softmobile.metric_family('softmobile_link_state', 'stateset', 'State of the link to central.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_link_state', ARRAY['branch', b.branch_id, 'softmobile_link_state', s], (b.link_state = s)::integer), '' ORDER BY b.branch_id, n)
			FROM unnest(branches) AS b, unnest('{up, down, unknown, not configured, inactive}'::text[]) WITH ORDINALITY AS w (s, n)))
		|| softmobile.metric_family('softmobile_link_since_seconds', 'gauge', 'Unix time at which the link came into its state.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_link_since_seconds', ARRAY['branch', b.branch_id], extract(epoch FROM b.since)), '' ORDER BY b.branch_id)
			FROM unnest(branches) AS b), 'seconds')
		|| softmobile.metric_family('softmobile_outbox_events', 'gauge', 'Events that central does not have.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_outbox_events', ARRAY['branch', s.branch_id, 'entity_type', s.entity_type, 'priority', lower(s.priority), 'status', v.status], v.events), ''
				ORDER BY s.branch_id, s.entity_type, s.priority, v.status)
			FROM softmobile.sync_outbox_stats s, LATERAL (VALUES ('pending', s.pending), ('failed', s.failed)) AS v (status, events)), 'events')
		|| softmobile.metric_family('softmobile_outbox_conflicts', 'gauge', 'Events in conflict that nobody has resolved.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_outbox_conflicts', ARRAY['branch', b.branch_id], b.conflicts), '' ORDER BY b.branch_id)
			FROM unnest(branches) AS b))
		|| softmobile.metric_family('softmobile_outbox_amount', 'gauge', 'Sum of the amounts of the events that central does not have.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_outbox_amount', ARRAY['branch', b.branch_id], b.pending_amount), '' ORDER BY b.branch_id)
			FROM unnest(branches) AS b))
		|| softmobile.metric_family('softmobile_outbox_oldest_age_seconds', 'gauge', 'Age of the oldest event that central does not have; 0 when it has all.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_outbox_oldest_age_seconds', ARRAY['branch', b.branch_id], coalesce(extract(epoch FROM b.oldest_pending_age), 0)), '' ORDER BY b.branch_id)
			FROM unnest(branches) AS b), 'seconds')
		|| softmobile.metric_family('softmobile_requests_success_ratio', 'gauge', 'Part of the last hour''s requests to central that succeeded.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_requests_success_ratio', ARRAY['branch', b.branch_id], round(b.success_rate / 100, 4)), '' ORDER BY b.branch_id)
			FROM unnest(branches) AS b), 'ratio')
		|| (
			SELECT softmobile.metric_family('softmobile_sent_events', 'counter', 'Events that central has taken.',
					string_agg(softmobile.metric_sample('softmobile_sent_events_total', ARRAY['branch', s.branch_id], s.events), '' ORDER BY s.branch_id), 'events')
				|| softmobile.metric_family('softmobile_differences', 'counter', 'Events that central answered as conflict or rejected.',
					string_agg(softmobile.metric_sample('softmobile_differences_total', ARRAY['branch', s.branch_id], s.differences), '' ORDER BY s.branch_id))
				|| softmobile.metric_family('softmobile_sessions', 'counter', 'Synchronisation sessions begun.',
					string_agg(softmobile.metric_sample('softmobile_sessions_total', ARRAY['branch', s.branch_id], s.sessions), '' ORDER BY s.branch_id))
				|| softmobile.metric_family('softmobile_failed_sessions', 'counter', 'Synchronisation sessions that failed.',
					string_agg(softmobile.metric_sample('softmobile_failed_sessions_total', ARRAY['branch', s.branch_id], s.failed), '' ORDER BY s.branch_id))
			FROM (
				SELECT b.branch_id, coalesce(sum(h.processed_events), 0) AS events, coalesce(sum(h.differences_detected), 0) AS differences,
					count(h.id) AS sessions, count(h.id) FILTER (WHERE h.status = 'failed') AS failed
				FROM unnest(branches) AS b LEFT JOIN softmobile.sync_session h ON h.branch_id = b.branch_id
				GROUP BY b.branch_id) AS s)
		|| softmobile.metric_family('softmobile_log_size_bytes', 'gauge', 'Disk space of the segments of the log.', (
			SELECT string_agg(softmobile.metric_sample('softmobile_log_size_bytes', ARRAY['segment', n::text], pg_total_relation_size(format('softmobile.outbox_event_%s', n)::regclass)), '' ORDER BY n)
			FROM generate_series(1, 4) AS n), 'bytes')
		|| E'# EOF\n';
END
$$;
COMMENT ON FUNCTION softmobile.metrics() IS
'The figures of queue, links and sessions in OpenMetrics text format (application/openmetrics-text; version=1.0.0), for a monitoring system to scrape through whatever serves SQL over HTTP.';
