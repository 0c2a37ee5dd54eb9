/*
 * Figures of the queue that cost the same whether ten events wait or ten million.
 *
 * A lane's numbers fall into blocks of tile_size().  Once all numbers of a block
 * are decided (committed and visible, or void), the worker counts its events and
 * writes tiles: a few rows that never change again and that go when the segment
 * of the log is emptied whose events they count.  An event's status depends on
 * its number alone, so a tile whose whole block is settled, or whose whole block
 * is open, stands for its events.  Only blocks that are partly settled, and what
 * lies above the last tile, are read from the log.
 *
 * Tiles are not dumped: they are counted anew from the log of the restored
 * database.  Written by tiles.c; nothing that sells touches them.
 */

CREATE TABLE softmobile.outbox_tile (
	log_id integer NOT NULL,
	block bigint NOT NULL,
	segment integer NOT NULL,
	entity_no integer NOT NULL,
	branch_id text COLLATE "C",
	events integer NOT NULL,
	amount numeric,
	oldest timestamptz NOT NULL,
	newest timestamptz NOT NULL,
	UNIQUE NULLS NOT DISTINCT (log_id, block, segment, entity_no, branch_id)
);
COMMENT ON TABLE softmobile.outbox_tile IS 'Counts of the log by lane, block of numbers and entity type, from which statistics are made. Written once by the worker; may be emptied by the owner at any time: statistics stay right, and the worker counts again.';
COMMENT ON COLUMN softmobile.outbox_tile.block IS 'The numbers from block * tile_size() + 1 to (block + 1) * tile_size().';
COMMENT ON COLUMN softmobile.outbox_tile.segment IS 'Segment of the log that the counted events lie in; the tile goes with them.';
COMMENT ON COLUMN softmobile.outbox_tile.branch_id IS 'Only in unregistered lanes: the branch of the events.';
COMMENT ON COLUMN softmobile.outbox_tile.amount IS 'Sum of the amounts, without deletions.';

CREATE FUNCTION softmobile.tile_size() RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1024;
COMMENT ON FUNCTION softmobile.tile_size() IS 'Internal: numbers in a block. Larger: more of the log is read for each lane; smaller: more tiles are.';

CREATE FUNCTION softmobile.write_tiles(log integer, first_block bigint, last_block bigint) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
	INSERT INTO softmobile.outbox_tile (log_id, block, segment, entity_no, branch_id, events, amount, oldest, newest)
	SELECT log, c.block, s.segment, c.entity_no, c.branch_id, c.events, c.amount, c.oldest, c.newest
	FROM (
		SELECT (e.seq - 1) / softmobile.tile_size() AS block, e.tableoid, e.entity_no, e.branch_id,
			count(*) AS events, sum(e.amount) FILTER (WHERE e.op <> 'd') AS amount, min(e.created_at) AS oldest, max(e.created_at) AS newest
		FROM softmobile.outbox_event e
		WHERE e.lane_id = log AND e.seq > first_block * softmobile.tile_size() AND e.seq <= (last_block + 1) * softmobile.tile_size()
		GROUP BY 1, 2, 3, 4) AS c
		JOIN (VALUES (1, 'softmobile.outbox_event_1'::regclass), (2, 'softmobile.outbox_event_2'),
			(3, 'softmobile.outbox_event_3'), (4, 'softmobile.outbox_event_4')) AS s (segment, relation) ON s.relation = c.tableoid
	-- A worker that has been replaced may still be counting, in the same order.
	ORDER BY 2, 3, 4, 5
	ON CONFLICT DO NOTHING
$$;
COMMENT ON FUNCTION softmobile.write_tiles(integer, bigint, bigint) IS
'Internal, for the worker: counts the blocks first_block to last_block of a lane''s log, all of whose numbers must be decided.';

CREATE FUNCTION softmobile.count_range(log integer, first_seq bigint, last_seq bigint, branch text, settled int8multirange, failed int8multirange)
RETURNS TABLE (entity_no integer, branch_id text, state "char", events bigint, amount numeric, oldest timestamptz, newest timestamptz)
LANGUAGE sql STABLE ROWS 10
-- No SET, no SECURITY DEFINER: it becomes a part of the query that calls it, which is what makes hundreds of lanes cheap.
BEGIN ATOMIC
	SELECT e.entity_no, e.branch_id,
		CASE WHEN settled @> e.seq THEN 's' WHEN failed @> e.seq THEN 'f' ELSE 'p' END::"char",
		count(*), sum(e.amount) FILTER (WHERE e.op <> 'd'), min(e.created_at), max(e.created_at)
	FROM softmobile.outbox_event e
	WHERE e.lane_id = log AND e.seq >= first_seq AND e.seq <= last_seq AND (branch IS NULL OR e.branch_id = branch)
	GROUP BY 1, 2, 3;
END;
COMMENT ON FUNCTION softmobile.count_range(integer, bigint, bigint, text, int8multirange, int8multirange) IS
'Internal, for outbox_counts(): counts the events of a range of numbers from the log. branch: only those of an unregistered branch.';

CREATE FUNCTION softmobile.outbox_counts()
RETURNS TABLE (lane_id integer, branch_id text, priority text, entity_no integer, state "char", events bigint, amount numeric, oldest timestamptz, newest timestamptz)
LANGUAGE sql STABLE ROWS 100 SECURITY DEFINER SET search_path = pg_catalog, pg_temp
-- By index, whatever the planner thinks of the size of ranges that it does not know.
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
	WITH lane AS MATERIALIZED (
		SELECT l.lane_id, l.log_id, l.branch_id, l.priority, l.settled_all, l.failed,
			CASE WHEN l.log_id <> l.lane_id THEN l.branch_id END AS of_branch,
			coalesce((SELECT max(t.block) FROM softmobile.outbox_tile t WHERE t.log_id = l.log_id) + 1, 0) AS tiled
		FROM softmobile.outbox_lane_state l
	), tile AS MATERIALIZED (
		SELECT l.lane_id, t.block, t.entity_no, t.branch_id, t.events, t.amount, t.oldest, t.newest,
			CASE
				WHEN l.settled_all @> b.seqs THEN 's'
				WHEN l.failed @> b.seqs THEN 'f'
				WHEN NOT l.settled_all && b.seqs AND NOT l.failed && b.seqs THEN 'p'
			END::"char" AS state
		FROM lane l
			JOIN softmobile.outbox_tile t ON t.log_id = l.log_id AND (l.of_branch IS NULL OR t.branch_id = l.of_branch)
			CROSS JOIN LATERAL (SELECT int8range(t.block * softmobile.tile_size() + 1, (t.block + 1) * softmobile.tile_size() + 1) AS seqs) AS b
	), part AS (
		SELECT t.lane_id, t.entity_no, t.branch_id, t.state, t.events, t.amount, t.oldest, t.newest
		FROM tile t WHERE t.state IS NOT NULL
		UNION ALL
		-- partly settled
		SELECT l.lane_id, c.entity_no, c.branch_id, c.state, c.events, c.amount, c.oldest, c.newest
		FROM (SELECT DISTINCT t.lane_id, t.block FROM tile t WHERE t.state IS NULL) AS m
			JOIN lane l USING (lane_id)
			CROSS JOIN LATERAL softmobile.count_range(l.log_id, m.block * softmobile.tile_size() + 1, (m.block + 1) * softmobile.tile_size(),
				l.of_branch, l.settled_all, l.failed) AS c
		UNION ALL
		-- not counted yet
		SELECT l.lane_id, c.entity_no, c.branch_id, c.state, c.events, c.amount, c.oldest, c.newest
		FROM lane l
			CROSS JOIN LATERAL softmobile.count_range(l.log_id, l.tiled * softmobile.tile_size() + 1, 9223372036854775807,
				l.of_branch, l.settled_all, l.failed) AS c
	)
	SELECT l.lane_id, coalesce(l.branch_id, p.branch_id), l.priority, p.entity_no, p.state,
		sum(p.events)::bigint, sum(p.amount), min(p.oldest), max(p.newest)
	FROM part p JOIN lane l USING (lane_id)
	-- An unregistered lane's event counts for the lane of its branch, if that is there.
	WHERE l.branch_id IS NOT NULL
		OR NOT EXISTS (SELECT FROM lane o WHERE o.of_branch = p.branch_id AND o.log_id = l.lane_id)
	GROUP BY 1, 2, 3, 4, 5
$$;
COMMENT ON FUNCTION softmobile.outbox_counts() IS
'Internal, for views: the log''s events by lane, branch, entity type and state (s settled: delivered, or an exception; f failed; p pending), with the sum of their amounts and the limits of their created_at.';

CREATE VIEW softmobile.sync_outbox_stats AS
WITH counted AS (
	SELECT n.branch_id, n.entity_no, n.priority,
		sum(n.events) AS total,
		coalesce(sum(n.events) FILTER (WHERE n.state = 'p'), 0) AS pending,
		coalesce(sum(n.events) FILTER (WHERE n.state = 'f'), 0) AS failed,
		0 AS conflicts,
		greatest(max(n.newest), max(l.last_attempt_at), max(b.settled_at)) AS latest_update,
		min(n.oldest) FILTER (WHERE n.state = 'p') AS oldest_pending,
		NULL::timestamptz AS last_conflict_at
	FROM softmobile.outbox_counts() n
		JOIN softmobile.outbox_lane l USING (lane_id)
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
COMMENT ON VIEW softmobile.sync_outbox_stats IS 'The queue by branch, entity type and priority. total counts delivered events too, as long as they are kept (softmobile.retention).';
