/*
 * The queue, page by page.
 *
 * No index has the log in the order of created_at (it would cost every sale), so
 * ORDER BY created_at over sync_outbox sorts all that waits.  The tiles know the
 * oldest event of each block: blocks are read in that order until no other can
 * hold anything older than what was found.
 */

CREATE FUNCTION softmobile.page_of_range(log integer, first_seq bigint, last_seq bigint, branch text, lane integer,
	settled int8multirange, failed int8multirange, wanted "char", after_at timestamptz, after_id uuid, page_size integer)
RETURNS TABLE (created_at timestamptz, id uuid, seq bigint, state "char")
LANGUAGE sql STABLE ROWS 50
-- No SET, no SECURITY DEFINER: it becomes a part of the query that calls it.
BEGIN ATOMIC
	SELECT e.created_at, e.id, e.seq, s.state
	FROM softmobile.outbox_event e
		CROSS JOIN LATERAL (SELECT CASE WHEN settled @> e.seq THEN 's' WHEN failed @> e.seq THEN 'f' ELSE 'p' END::"char") AS s (state)
	WHERE e.lane_id = log AND e.seq >= first_seq AND e.seq <= last_seq AND (branch IS NULL OR e.branch_id = branch)
		AND s.state = coalesce(wanted, s.state) AND (e.created_at, e.id) > (after_at, after_id)
		AND (s.state <> 's' OR NOT EXISTS (SELECT FROM softmobile.outbox_exception x WHERE x.lane_id = lane AND x.seq = e.seq))
		-- An unregistered lane's event is one of the lane of its branch, if that is there.
		AND (lane <> log OR e.branch_id IS NULL OR NOT EXISTS (SELECT FROM softmobile.outbox_lane o WHERE o.branch_id = e.branch_id AND o.log_id = log))
	ORDER BY e.created_at, e.id LIMIT page_size;
END;
COMMENT ON FUNCTION softmobile.page_of_range(integer, bigint, bigint, text, integer, int8multirange, int8multirange, "char", timestamptz, uuid, integer) IS
'Internal, for sync_outbox_page(): the oldest events of a range of numbers. wanted: p, f, s as in outbox_counts(), NULL any.';

CREATE FUNCTION softmobile.sync_outbox_page(status text DEFAULT NULL, branch text DEFAULT NULL, page_size integer DEFAULT 50, after uuid DEFAULT NULL)
RETURNS SETOF softmobile.sync_outbox
LANGUAGE plpgsql STABLE ROWS 50 SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
	wanted "char" := CASE sync_outbox_page.status WHEN 'PENDING' THEN 'p' WHEN 'FAILED' THEN 'f' WHEN 'SENT' THEN 's' END;
	after_at timestamptz := '-infinity';
	after_id uuid := coalesce(after, '00000000-0000-0000-0000-000000000000');
	part record;
	ats timestamptz[];
	ids uuid[];
	lanes integer[];
	seqs bigint[];
	states "char"[];
BEGIN
	IF sync_outbox_page.status IS NOT NULL AND wanted IS NULL THEN
		RAISE EXCEPTION 'unknown status "%"', sync_outbox_page.status
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use PENDING, FAILED, SENT, or NULL for all.';
	END IF;
	IF page_size IS NULL OR page_size NOT BETWEEN 1 AND 1000 THEN
		RAISE EXCEPTION 'page_size must be from 1 to 1000'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the id of the last event as after to get the next page.';
	END IF;
	PERFORM softmobile.known_branch(branch);
	IF after IS NOT NULL THEN
		SELECT e.created_at INTO after_at FROM softmobile.outbox_event e WHERE e.id = after
		UNION ALL SELECT x.created_at FROM softmobile.outbox_exception x WHERE x.id = after LIMIT 1;
		IF NOT FOUND THEN
			RAISE EXCEPTION 'there is no event %', after
				USING ERRCODE = 'no_data_found', HINT = 'Pass the id of the last event of the page before; begin anew if it is not kept any more.';
		END IF;
	END IF;

	SELECT array_agg(p.created_at), array_agg(p.id), array_agg(NULL::integer), array_agg(NULL::bigint), array_agg(NULL::"char")
	INTO ats, ids, lanes, seqs, states
	FROM (
		SELECT x.created_at, x.id
		FROM softmobile.outbox_exception x
		WHERE (branch IS NULL OR x.branch_id = branch) AND (x.created_at, x.id) > (after_at, after_id)
			AND coalesce(wanted, '') IN ('', CASE x.state WHEN 'failed' THEN 'f' WHEN 'queued' THEN 'p' ELSE 's' END)
		ORDER BY x.created_at, x.id LIMIT page_size) AS p;

	FOR part IN
		WITH lane AS MATERIALIZED (
			SELECT l.lane_id, l.log_id, l.settled_all, l.failed, CASE WHEN l.log_id <> l.lane_id THEN l.branch_id END AS of_branch,
				coalesce((SELECT max(t.block) FROM softmobile.outbox_tile t WHERE t.log_id = l.log_id) + 1, 0) AS tiled
			FROM softmobile.outbox_lane_state l
			WHERE branch IS NULL OR l.branch_id = branch
		)
		SELECT l.lane_id, l.log_id, l.of_branch, l.settled_all, l.failed,
			t.block * softmobile.tile_size() + 1 AS first_seq, (t.block + 1) * softmobile.tile_size() AS last_seq, t.oldest
		FROM lane l
			JOIN (
				SELECT o.log_id, o.block, min(o.oldest) AS oldest, max(o.newest) AS newest,
					int8range(o.block * softmobile.tile_size() + 1, (o.block + 1) * softmobile.tile_size() + 1) AS numbers
				FROM softmobile.outbox_tile o GROUP BY o.log_id, o.block) AS t USING (log_id)
		WHERE t.newest >= after_at AND CASE wanted
			WHEN 's' THEN l.settled_all && t.numbers
			WHEN 'f' THEN l.failed && t.numbers
			WHEN 'p' THEN NOT l.settled_all @> t.numbers AND NOT l.failed @> t.numbers
			ELSE true END
		UNION ALL
		SELECT l.lane_id, l.log_id, l.of_branch, l.settled_all, l.failed, l.tiled * softmobile.tile_size() + 1, 9223372036854775807, '-infinity'
		FROM lane l
		ORDER BY oldest
	LOOP
		EXIT WHEN cardinality(ats) = page_size AND part.oldest > ats[page_size];
		SELECT array_agg(p.created_at), array_agg(p.id), array_agg(p.lane_id), array_agg(p.seq), array_agg(p.state)
		INTO ats, ids, lanes, seqs, states
		FROM (
			SELECT * FROM unnest(ats, ids, lanes, seqs, states) AS f (created_at, id, lane_id, seq, state)
			UNION ALL
			SELECT r.created_at, r.id, part.lane_id, r.seq, r.state
			FROM softmobile.page_of_range(part.log_id, part.first_seq, part.last_seq, part.of_branch, part.lane_id,
				part.settled_all, part.failed, wanted, after_at, after_id, page_size) AS r
			ORDER BY 1, 2 LIMIT page_size) AS p;
	END LOOP;

	RETURN QUERY
		SELECT o.*
		FROM unnest(ids, lanes, seqs, states) WITH ORDINALITY AS p (id, lane_id, seq, state, place)
			CROSS JOIN LATERAL (
				SELECT e.id, coalesce(l.branch_id, e.branch_id), t.entity_type, e.entity_id,
					CASE e.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END,
					e.payload, e.reason, e.actor, CASE p.state WHEN 's' THEN 'SENT' WHEN 'f' THEN 'FAILED' ELSE 'PENDING' END, l.priority,
					CASE p.state WHEN 's' THEN b.attempt_count WHEN 'f' THEN l.attempt_count ELSE 0 END,
					CASE p.state WHEN 's' THEN b.last_attempt_at WHEN 'f' THEN l.last_attempt_at END,
					CASE p.state WHEN 'f' THEN l.error_message END, false, e.created_at,
					CASE p.state WHEN 's' THEN b.settled_at WHEN 'f' THEN coalesce(l.last_attempt_at, e.created_at) ELSE e.created_at END
				FROM softmobile.outbox_lane l
					JOIN softmobile.outbox_event e ON e.lane_id = l.log_id AND e.seq = p.seq
					JOIN softmobile.outbox_entity t USING (entity_no)
					LEFT JOIN LATERAL softmobile.ledger_of(l.lane_id, e.seq) AS b ON p.state = 's'
				WHERE l.lane_id = p.lane_id
				UNION ALL
				SELECT x.id, x.branch_id, t.entity_type, x.entity_id,
					CASE x.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END,
					x.payload, x.reason, x.actor, CASE x.state WHEN 'failed' THEN 'FAILED' WHEN 'queued' THEN 'PENDING' ELSE 'SENT' END, l.priority,
					x.attempt_count, x.last_attempt_at, x.error_message, x.kind = 'conflict' AND x.state IN ('failed', 'queued'), x.created_at, x.updated_at
				FROM softmobile.outbox_exception x JOIN softmobile.outbox_lane l USING (lane_id) JOIN softmobile.outbox_entity t USING (entity_no)
				WHERE p.lane_id IS NULL AND x.id = p.id) AS o
		ORDER BY p.place;
END
$$;
COMMENT ON FUNCTION softmobile.sync_outbox_page(text, text, integer, uuid) IS
'The rows of sync_outbox in the order of created_at and id, a page at a time and as fast whether ten events wait or ten million. status: PENDING, FAILED, SENT, NULL all; branch NULL: all; after: id of the last row of the page before. Errors: 22023 status or page_size (1 to 1000), 42704 unknown branch, P0002 after is not kept any more.';
