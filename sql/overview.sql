-- The figures: what tiles stand for is what the log holds; the overview; the metrics.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
CREATE TABLE sale (id integer PRIMARY KEY, store text, total numeric);
CREATE TABLE sale_line (id integer PRIMARY KEY, store text);
CREATE TABLE customer (id integer PRIMARY KEY, store text);
SELECT softmobile.attach('sale', 'sale', branch_column => 'store', amount_column => 'total'), softmobile.attach('sale_line', 'sale_line', branch_column => 'store'), softmobile.attach('customer', 'customer', branch_column => 'store');
SELECT softmobile.register_branch('S2', 'Norte', active => false);

-- nothing to send: a row for each branch
SELECT branch_id, link_state IN ('unknown', 'not configured') AS no_link, percent, pending, failed, conflicts, oldest_pending_age, pending_amount, events_per_minute, success_rate, estimated_completion, name, total, last_sent_at, error_message
FROM softmobile.sync_overview ORDER BY branch_id;
SELECT link_state FROM softmobile.sync_overview WHERE branch_id = 'S2';

-- blocks of four numbers, so that a small log has many
CREATE OR REPLACE FUNCTION softmobile.tile_size() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 4;

-- the definition of the statistics, event by event
CREATE VIEW plain_stats AS
WITH counted AS (
	SELECT coalesce(l.branch_id, e.branch_id) AS branch_id, e.entity_no, l.priority,
		count(*) AS total,
		count(*) FILTER (WHERE NOT l.settled_all @> e.seq AND NOT l.failed @> e.seq) AS pending,
		count(*) FILTER (WHERE l.failed @> e.seq) AS failed,
		0 AS conflicts,
		greatest(max(e.created_at), max(l.last_attempt_at), max(b.settled_at)) AS latest_update,
		min(e.created_at) FILTER (WHERE NOT l.settled_all @> e.seq AND NOT l.failed @> e.seq) AS oldest_pending,
		NULL::timestamptz AS last_conflict_at
	FROM softmobile.outbox_event e
		JOIN softmobile.outbox_lane_state l ON l.log_id = e.lane_id
			-- an unregistered lane's event counts for its branch's lane, if that is there
			AND CASE WHEN l.branch_id IS NULL
				THEN NOT EXISTS (SELECT FROM softmobile.outbox_lane o WHERE o.log_id = l.lane_id AND o.branch_id = e.branch_id)
				ELSE l.log_id = l.lane_id OR l.branch_id = e.branch_id END
		LEFT JOIN softmobile.outbox_batch b ON b.batch_id = l.settled_batch
	GROUP BY 1, 2, 3
	UNION ALL
	-- Exceptions were counted as settled.
	SELECT x.branch_id, x.entity_no, l.priority, 0,
		count(*) FILTER (WHERE x.state = 'queued'),
		count(*) FILTER (WHERE x.state = 'failed'),
		count(*) FILTER (WHERE x.kind = 'conflict'),
		max(x.updated_at),
		min(x.created_at) FILTER (WHERE x.state = 'queued'),
		max(x.recorded_at) FILTER (WHERE x.kind = 'conflict')
	FROM softmobile.outbox_exception x JOIN softmobile.outbox_lane l USING (lane_id)
	WHERE x.state IN ('failed', 'queued')
	GROUP BY 1, 2, 3)
SELECT c.branch_id, t.entity_type, c.priority,
	sum(c.total)::bigint AS total, sum(c.pending)::bigint AS pending, sum(c.failed)::bigint AS failed, sum(c.conflicts)::bigint AS conflicts,
	max(c.latest_update) AS latest_update, min(c.oldest_pending) AS oldest_pending, max(c.last_conflict_at) AS last_conflict_at
FROM counted c JOIN softmobile.outbox_entity t USING (entity_no)
GROUP BY c.branch_id, t.entity_type, c.priority;
CREATE VIEW plain_amount AS
SELECT l.branch_id, sum(e.amount) AS amount
FROM softmobile.outbox_lane_state l JOIN softmobile.outbox_event e ON e.lane_id = l.log_id AND (l.log_id = l.lane_id OR l.branch_id = e.branch_id)
WHERE l.branch_id IS NOT NULL AND NOT l.settled_all @> e.seq AND e.op <> 'd'
GROUP BY l.branch_id;
CREATE VIEW differing AS
(SELECT * FROM plain_stats EXCEPT SELECT * FROM softmobile.sync_outbox_stats) UNION ALL (SELECT * FROM softmobile.sync_outbox_stats EXCEPT SELECT * FROM plain_stats);

-- sales of three branches, one of them unregistered; a third of the transactions is rolled back
CREATE PROCEDURE sell(n integer) LANGUAGE plpgsql AS $$
DECLARE
	store text;
BEGIN
	FOR i IN 1 .. n LOOP
		store := (ARRAY['S1', 'S1', 'S2', 'S3'])[1 + floor(random() * 4)];
		BEGIN
			INSERT INTO sale VALUES ((SELECT coalesce(max(id), 0) + 1 FROM sale), store, round((random() * 100)::numeric, 2));
			INSERT INTO sale_line SELECT (SELECT coalesce(max(id), 0) FROM sale_line) + g, store FROM generate_series(1, floor(random() * 4)::integer) AS g;
			IF random() < 0.3 THEN
				UPDATE sale SET total = total + 1 WHERE id = (SELECT max(id) FROM sale);
			END IF;
			IF random() < 0.2 THEN
				DELETE FROM sale WHERE id = (SELECT max(id) FROM sale);
			END IF;
			INSERT INTO customer SELECT (SELECT coalesce(max(id), 0) + 1 FROM customer), store WHERE random() < 0.5;
			IF random() < 0.3 THEN
				RAISE EXCEPTION SQLSTATE 'SM000';
			END IF;
		EXCEPTION WHEN SQLSTATE 'SM000' THEN
			NULL;
		END;
	END LOOP;
END
$$;
CALL sell(100);
SELECT count(*) FROM differing;
-- the unregistered branch gets its lanes, and events of its own
SELECT softmobile.register_branch('S3', 'Sur');
CALL sell(100);
SELECT count(*) FROM differing;

-- tiles of all blocks but the last of each lane; nobody else writes, so all numbers are decided
CREATE PROCEDURE count_all() LANGUAGE plpgsql AS $$
DECLARE
	log record;
BEGIN
	FOR log IN SELECT e.lane_id, max(e.seq) / softmobile.tile_size() - 1 AS last_block FROM softmobile.outbox_event e GROUP BY 1 ORDER BY 1 LOOP
		PERFORM softmobile.write_tiles(log.lane_id, 0, log.last_block);
	END LOOP;
END
$$;
CALL count_all();
SELECT count(*) > 100 AS many, bool_and(events BETWEEN 1 AND 4) AS small, count(DISTINCT branch_id) AS unregistered FROM softmobile.outbox_tile;
SELECT count(*) FROM differing;
-- more sales: the tail is read from the log
CALL sell(30);
SELECT count(*) FROM differing;

-- whatever is settled, failed or an exception: 40 states
CREATE FUNCTION some_numbers(log integer, branch text) RETURNS int8multirange LANGUAGE sql AS $$
	SELECT coalesce(range_agg(int8range(e.seq, e.seq + 1)), '{}') FROM softmobile.outbox_event e
	WHERE e.lane_id = log AND (e.branch_id IS NULL OR e.branch_id = branch) AND random() < (SELECT random() OFFSET 0)
$$;
CREATE FUNCTION some_state() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
	kind integer := floor(random() * 4);
	l softmobile.outbox_lane;
	top bigint;
	chosen int8multirange;
	middle bigint;
BEGIN
	DELETE FROM softmobile.outbox_exception;
	DELETE FROM softmobile.outbox_batch;
	UPDATE softmobile.outbox_lane SET settled = '{}', settled_batch = 0, status = 'idle', batch = NULL, last_attempt_at = NULL;
	FOR l IN SELECT * FROM softmobile.outbox_lane WHERE branch_id IS NOT NULL LOOP
		top := coalesce((SELECT max(seq) FROM softmobile.outbox_event WHERE lane_id = l.log_id), 0);
		CONTINUE WHEN top = 0;
		middle := floor(random() * top) + 1;
		-- what central has: from the first, void numbers included; scattered; or part of it in the ledger only
		chosen := CASE WHEN kind < 2 AND l.log_id = l.lane_id THEN int8multirange(int8range(1, middle + 1)) ELSE some_numbers(l.log_id, l.branch_id) END;
		UPDATE softmobile.outbox_lane SET settled = chosen WHERE lane_id = l.lane_id;
		IF kind IN (1, 3) THEN
			INSERT INTO softmobile.outbox_batch (lane_id, kind, members, last_seq, events)
			SELECT l.lane_id, 'sent', s, upper(s) - 1, 1 FROM some_numbers(l.log_id, l.branch_id) AS s WHERE NOT isempty(s);
		END IF;
		IF random() < 0.5 THEN
			UPDATE softmobile.outbox_lane SET status = 'failed', last_attempt_at = now(), error_message = 'offline',
				batch = CASE WHEN random() < 0.5 AND l.log_id = l.lane_id THEN int8multirange(int8range(middle, middle + 20)) ELSE some_numbers(l.log_id, l.branch_id) END
			WHERE lane_id = l.lane_id;
		END IF;
		INSERT INTO softmobile.outbox_exception (id, lane_id, seq, entity_no, entity_id, op, branch_id, created_at, actor, payload, kind, state)
		SELECT e.id, l.lane_id, e.seq, e.entity_no, e.entity_id, e.op, l.branch_id, e.created_at, e.actor, e.payload,
			(ARRAY['rejected', 'conflict', 'waiting'])[1 + floor(random() * 3)], (ARRAY['failed', 'queued', 'delivered'])[1 + floor(random() * 3)]
		FROM softmobile.outbox_event e
		WHERE e.lane_id = l.log_id AND chosen @> e.seq AND random() < 0.1;
	END LOOP;
	RETURN (SELECT count(*) FROM differing);
END
$$;
SELECT count(*) AS states, sum(differences) AS differences FROM (SELECT some_state() AS differences FROM generate_series(1, 40)) AS s;

-- pages: all of sync_outbox, in order, whatever is asked for
CREATE FUNCTION turn_pages(status text, branch text, page_size integer) RETURNS SETOF softmobile.sync_outbox LANGUAGE plpgsql AS $$
DECLARE
	row softmobile.sync_outbox;
	last uuid;
BEGIN
	LOOP
		row := NULL;
		FOR row IN SELECT * FROM softmobile.sync_outbox_page(status, branch, page_size, after => last) LOOP
			RETURN NEXT row;
		END LOOP;
		EXIT WHEN row.id IS NULL;
		last := row.id;
	END LOOP;
END
$$;
CREATE FUNCTION unequal_pages() RETURNS bigint LANGUAGE sql AS $$
	SELECT count(*) FROM unnest('{PENDING, FAILED, SENT, NULL}'::text[]) AS s, unnest('{S1, S3, NULL}'::text[]) AS b
	WHERE (SELECT string_agg(p::text, E'\n') FROM turn_pages(s, b, 100) p)
		IS DISTINCT FROM (SELECT string_agg(o::text, E'\n' ORDER BY o.created_at, o.id) FROM softmobile.sync_outbox o WHERE (s IS NULL OR o.status = s) AND (b IS NULL OR o.branch_id = b))
$$;
SELECT count(*) AS states, sum(differences) AS differences, sum(pages) AS unequal_pages FROM (SELECT some_state() AS differences, unequal_pages() AS pages FROM generate_series(1, 5)) AS s;
SELECT call, f.* FROM unnest('{"softmobile.sync_outbox_page(''WAITING'')", "softmobile.sync_outbox_page(page_size => 0)", "softmobile.sync_outbox_page(page_size => 1001)",
	"softmobile.sync_outbox_page(branch => ''S9'')", "softmobile.sync_outbox_page(after => ''00000000-0000-7000-8000-000000000000'')"}'::text[]) AS call, failure('SELECT ' || call) AS f;

-- the overview agrees with the statistics
SELECT count(*) AS branches, bool_and(o.pending = s.pending AND o.failed = s.failed AND o.conflicts = s.conflicts AND o.total = s.total) AS agree,
	bool_and(o.percent = trunc(100 * (s.total - s.pending - s.failed) / s.total, 2)) AS percent
FROM softmobile.sync_overview o
	JOIN (SELECT branch_id, sum(pending) AS pending, sum(failed) AS failed, sum(conflicts) AS conflicts, sum(total) AS total FROM softmobile.sync_outbox_stats GROUP BY 1) AS s USING (branch_id);
DELETE FROM softmobile.outbox_exception;
SELECT count(*) FROM softmobile.sync_overview o LEFT JOIN plain_amount p USING (branch_id) WHERE o.pending_amount IS DISTINCT FROM coalesce(p.amount, 0);

-- tiles can be thrown away, and a segment takes its own along
TRUNCATE softmobile.outbox_tile;
SELECT count(*) FROM differing;
CALL count_all();
UPDATE softmobile.outbox_lane l SET status = 'idle', batch = NULL, settled = CASE WHEN l.log_id = l.lane_id THEN '{[1,100000)}'
	ELSE coalesce((SELECT range_agg(int8range(e.seq, e.seq + 1)) FROM softmobile.outbox_event e WHERE e.lane_id = l.log_id AND e.branch_id = l.branch_id), '{}') END
WHERE branch_id IS NOT NULL;
DELETE FROM softmobile.outbox_segment;
INSERT INTO softmobile.outbox_segment VALUES (1, false, now() - interval '90 days', now() - interval '80 days'), (2, true, now(), NULL);
SELECT softmobile.lanes_changed();
CALL sell(30);
CALL count_all();
SELECT count(*) FROM differing;
SELECT count(*) > 0 AS counted FROM softmobile.outbox_tile WHERE segment = 1;
SELECT softmobile.recycle_segments('30 days') \g /dev/null
SELECT count(*) FROM softmobile.outbox_event_1;
SELECT count(*) FROM softmobile.outbox_tile WHERE segment = 1;
SELECT count(*) > 0 AS counted FROM softmobile.outbox_tile WHERE segment = 2;
SELECT count(*) FROM differing;

-- rate, rate of success and forecast come from the ledger and from failed sessions
TRUNCATE softmobile.outbox_batch, softmobile.sync_session;
INSERT INTO softmobile.outbox_batch (lane_id, kind, members, last_seq, events, exceptions, settled_at)
SELECT l.lane_id, v.kind, '{}', 0, v.events, v.exceptions, clock_timestamp() - v.age
FROM softmobile.outbox_lane l, (VALUES ('sent', 300, 0, interval '1 minute'), ('sent', 210, 10, '4 minutes'), ('void', 7, 0, '0'), ('sent', 1000, 0, '6 minutes'), ('sent', 1000, 0, '2 hours')) AS v (kind, events, exceptions, age)
WHERE l.branch_id = 'S1' AND l.priority = 'HIGH';
INSERT INTO softmobile.sync_session (branch_id, mode, status, finished_at, triggered_by) VALUES ('S1', 'manual', 'failed', clock_timestamp(), 'me'), ('S1', 'manual', 'success', clock_timestamp(), 'me'),
	('S1', 'manual', 'failed', clock_timestamp() - interval '2 hours', 'me'), ('S2', 'automatic', 'failed', clock_timestamp(), 'me');
SELECT branch_id, events_per_minute, success_rate, estimated_completion FROM softmobile.sync_overview ORDER BY branch_id;

-- metrics: the format's rules
SELECT softmobile.register_branch(E'q"b\\s', E'quote, backslash');
CREATE TABLE line AS SELECT n, line FROM regexp_split_to_table(softmobile.metrics(), E'\n') WITH ORDINALITY AS l (line, n);
-- the last line is EOF, with a line feed and nothing after it; no line is empty
SELECT line FROM line WHERE n >= (SELECT max(n) - 1 FROM line) ORDER BY n;
SELECT count(*) FROM line WHERE line IN ('', '# EOF');
-- each line is metadata or a sample
CREATE VIEW metadata AS SELECT n, (regexp_match(line, '^# (TYPE|UNIT|HELP) ([a-z][a-z_]*) (.+)$'))[1:3] AS m FROM line WHERE line ~ '^# [A-Z]+ ';
CREATE VIEW sample AS SELECT n, (regexp_match(line, '^([a-z_]+)({(?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"(?:,(?=[a-z])|(?=})))+})? (-?[0-9]+(?:\.[0-9]+)?)$'))[1:3] AS s FROM line WHERE line !~ '^#' AND line <> '';
SELECT (SELECT count(*) FROM metadata WHERE m IS NULL) AS no_metadata, (SELECT count(*) FROM sample WHERE s IS NULL) AS no_samples, (SELECT count(*) FROM sample) > 30 AS many;
-- a family's lines stand together: one TYPE, then its samples, named after it by the rules of its type
CREATE VIEW family AS SELECT m[2] AS name, m[3] AS type, n, lead(n, 1, (SELECT max(n) - 1 FROM line)) OVER (ORDER BY n) AS next FROM metadata WHERE m[1] = 'TYPE';
SELECT name, type, u.m[3] AS unit, u.m IS NULL OR name LIKE '%\_' || u.m[3] AS named_by_unit,
	(SELECT count(*) FROM metadata m WHERE m.m[2] = f.name AND m.m[1] = 'HELP' AND m.n BETWEEN f.n AND f.next) AS help,
	(SELECT coalesce(bool_and(s.s[1] = f.name || CASE f.type WHEN 'counter' THEN '_total' WHEN 'info' THEN '_info' ELSE '' END), true) FROM sample s WHERE s.n BETWEEN f.n AND f.next) AS named_by_type
FROM family f LEFT JOIN metadata u ON u.m[1] = 'UNIT' AND u.m[2] = f.name ORDER BY f.n;
SELECT count(*) - count(DISTINCT name) AS doubled FROM family;
SELECT count(*) - count(DISTINCT (s[1], s[2])) AS doubled FROM sample;
SELECT line FROM line WHERE line LIKE '%q"b%' OR line LIKE '%q\\"b%' ORDER BY n LIMIT 2;
SELECT sum(s[3]::numeric) AS active_states FROM sample WHERE s[1] = 'softmobile_link_state' GROUP BY s[2] LIKE '%q\\"b%' ORDER BY 1;

-- who may look
CREATE ROLE overview_app;
CREATE ROLE overview_operator;
CREATE ROLE overview_auditor;
SELECT softmobile.grant_role('overview_app', 'app'), softmobile.grant_role('overview_operator', 'operator'), softmobile.grant_role('overview_auditor', 'auditor');
SET ROLE overview_app;
SELECT count(*) FROM softmobile.sync_overview;
SELECT count(*) >= 0 AS figures FROM softmobile.sync_outbox_stats;
SELECT softmobile.metrics();
SELECT count(*) FROM softmobile.outbox_tile;
SET ROLE overview_operator;
SELECT count(*) FROM softmobile.sync_overview;
SELECT softmobile.metrics() LIKE '%# EOF%' AS metrics;
SET ROLE overview_auditor;
SELECT count(*) FROM softmobile.sync_overview;
SELECT softmobile.metrics() LIKE '%# EOF%' AS metrics;
RESET ROLE;
DROP OWNED BY overview_app, overview_operator, overview_auditor;
DROP ROLE overview_app, overview_operator, overview_auditor;
