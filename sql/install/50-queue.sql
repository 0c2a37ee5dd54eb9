/*
 * Calls that change the queue.  Each leaves its wish in outbox_request and an
 * audit row; the worker carries the wish out after the caller's commit, so the
 * functions return what will happen.
 */

CREATE FUNCTION softmobile.known_branch(branch text) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF branch IS NOT NULL AND NOT EXISTS (SELECT FROM softmobile.branch b WHERE b.branch_id = branch) THEN
		RAISE EXCEPTION 'unknown branch "%"', branch
			USING ERRCODE = 'undefined_object',
				HINT = coalesce('Registered are: ' || (SELECT string_agg(format('%L', b.branch_id), ', ' ORDER BY b.branch_id)
					FROM (SELECT branch_id FROM softmobile.branch ORDER BY branch_id LIMIT 10) b) || '.',
					'No branch is registered yet; call softmobile.register_branch().');
	END IF;
	RETURN branch;
END
$$;
COMMENT ON FUNCTION softmobile.known_branch(text) IS 'Internal: its argument, if it is NULL or a registered branch; else 42704.';

CREATE FUNCTION softmobile.required_reason(reason text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	before text := current_setting('softmobile.reason', true);
	trimmed text;
BEGIN
	reason := coalesce(reason, softmobile.current_reason());
	IF reason IS NULL THEN
		RAISE EXCEPTION 'X-Reason required: at least 5 characters'
			USING ERRCODE = 'check_violation', HINT = 'Pass reason => ''why'', or call softmobile.set_reason() first.';
	END IF;
	-- set_reason() has the rules; what was set before is set again.
	PERFORM softmobile.set_reason(reason);
	trimmed := current_setting('softmobile.reason');
	PERFORM set_config('softmobile.reason', coalesce(before, ''), true);
	RETURN trimmed;
END
$$;
COMMENT ON FUNCTION softmobile.required_reason(text) IS 'Internal: the reason given, else the one in force, trimmed; errors as set_reason(), 23514 when there is none.';

-- This script is plain ASCII, so that it means the same in every encoding.
CREATE FUNCTION softmobile.automatic_reason() RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	RETURN 'Reintento autom' || convert_from('\xc3a1', 'UTF8') || 'tico programado';
EXCEPTION WHEN untranslatable_character THEN
	RETURN 'Reintento automatico programado';
END
$$;
COMMENT ON FUNCTION softmobile.automatic_reason() IS 'Internal: the reason of automatic requeues in sync_audit, as the operating procedure words it (where the database''s encoding has no a with acute: without that).';

CREATE FUNCTION softmobile.requeue_failed_outbox_entries(branch text DEFAULT NULL, min_age interval DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	age interval := coalesce(min_age, current_setting('softmobile.retry_interval')::interval);
	events bigint;
BEGIN
	IF age < interval '0' THEN
		RAISE EXCEPTION 'min_age must not be negative'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use interval ''0'' for all failed events.';
	END IF;
	PERFORM softmobile.known_branch(branch);
	SELECT coalesce((SELECT sum(upper(r.seqs) - lower(r.seqs))
			FROM softmobile.outbox_lane_state l CROSS JOIN LATERAL unnest(l.failed) AS r (seqs)
			WHERE (branch IS NULL OR l.branch_id = branch) AND l.last_attempt_at <= clock_timestamp() - age), 0)
		+ (SELECT count(*) FROM softmobile.outbox_exception x
			WHERE x.state = 'failed' AND x.kind = 'rejected' AND (branch IS NULL OR x.branch_id = branch)
				AND x.attempt_count < current_setting('softmobile.max_attempts')::integer
				AND x.last_attempt_at <= clock_timestamp() - age)
	INTO events;
	IF events > 0 THEN
		INSERT INTO softmobile.outbox_request (kind, branch_id, min_age, reason) VALUES ('requeue', branch, age, softmobile.current_reason());
		PERFORM softmobile.record_audit('requeue', branch, coalesce(softmobile.current_reason(), softmobile.automatic_reason()),
			events, NULL, jsonb_build_object('min_age', age), softmobile.calling_role());
		PERFORM softmobile.poke();
	END IF;
	RETURN events;
END
$$;
COMMENT ON FUNCTION softmobile.requeue_failed_outbox_entries(text, interval) IS
'Requeues failed events whose last attempt is at least min_age ago (default: softmobile.retry_interval), of a branch or of all: they become PENDING with attempt_count 0 and are tried at once. Returns how many. Takes effect after commit. Conflicts and events at softmobile.max_attempts stay. Errors: 42704 unknown branch, 22023.';

CREATE FUNCTION softmobile.sync_outbox_retry(ids uuid[], reason text DEFAULT NULL) RETURNS SETOF softmobile.sync_outbox
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	why text := softmobile.required_reason(sync_outbox_retry.reason);
	wanted uuid[];
	first uuid;
	last uuid;
	found uuid[];
	sent uuid;
	conflict uuid;
	missing uuid;
BEGIN
	IF ids IS NULL OR cardinality(ids) = 0 OR array_position(ids, NULL) IS NOT NULL THEN
		RAISE EXCEPTION 'no event ids given'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'SELECT id FROM softmobile.sync_outbox WHERE status = ''FAILED'' lists what can be retried.';
	END IF;
	wanted := ARRAY(SELECT DISTINCT i FROM unnest(ids) AS i);
	-- Ids grow with time, so their limits find the part of the log that holds them.
	first := (SELECT i FROM unnest(wanted) AS i ORDER BY i LIMIT 1);
	last := (SELECT i FROM unnest(wanted) AS i ORDER BY i DESC LIMIT 1);

	SELECT array_agg(o.id), (array_agg(o.id) FILTER (WHERE o.status = 'SENT'))[1], (array_agg(o.id) FILTER (WHERE o.conflict_flag))[1]
	INTO found, sent, conflict
	FROM softmobile.sync_outbox o WHERE o.id >= first AND o.id <= last AND o.id = ANY (wanted);
	IF coalesce(cardinality(found), 0) < cardinality(wanted) THEN
		missing := (SELECT i FROM unnest(wanted) AS i WHERE i <> ALL (coalesce(found, '{}')) LIMIT 1);
		RAISE EXCEPTION 'there is no event %', missing
			USING ERRCODE = 'no_data_found', HINT = 'Take the ids from softmobile.sync_outbox.';
	END IF;
	IF sent IS NOT NULL THEN
		RAISE EXCEPTION 'event % has been sent', sent
			USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Central acknowledged it.',
				HINT = 'If central has lost it since, use softmobile.resend().';
	END IF;
	IF conflict IS NOT NULL THEN
		RAISE EXCEPTION 'event % is in conflict', conflict
			USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Central holds another version of the row.',
				HINT = 'Resolve the conflict instead of retrying; see softmobile.sync_conflicts.';
	END IF;

	INSERT INTO softmobile.outbox_request (kind, ids, reason) VALUES ('retry', wanted, why);
	PERFORM softmobile.record_audit('retry', NULL, why, cardinality(wanted), wanted, NULL, softmobile.calling_role());
	PERFORM softmobile.poke();
	RETURN QUERY
		SELECT o.id, o.branch_id, o.entity_type, o.entity_id, o.operation,
			CASE WHEN has_column_privilege(softmobile.calling_role(), 'softmobile.sync_outbox', 'payload', 'SELECT') THEN o.payload END, o.reason, o.actor, 'PENDING'::text, o.priority,
			0, NULL::timestamptz, NULL::text, false, o.created_at, clock_timestamp()
		FROM softmobile.sync_outbox o WHERE o.id >= first AND o.id <= last AND o.id = ANY (wanted)
		ORDER BY o.created_at, o.id;
END
$$;
COMMENT ON FUNCTION softmobile.sync_outbox_retry(uuid[], text) IS
'Retries events: they become PENDING with attempt_count 0 (a failed batch as a whole) and are tried at once. reason: at least 5 characters, NULL: the one in force. Ids given twice count once. Returns the events as they will be; payload is NULL for who may not read it. Takes effect after commit. Errors: 22023 no ids, P0002 unknown id, 55000 sent already (use resend()) or in conflict, 23514 no reason.';

CREATE FUNCTION softmobile.resend(branch text, lane text, seqs int8multirange, reason text, epoch uuid DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	why text := softmobile.required_reason(resend.reason);
	target softmobile.outbox_lane_state;
	events bigint;
BEGIN
	PERFORM softmobile.known_branch(branch);
	IF branch IS NULL OR lane IS NULL OR upper(lane) NOT IN ('HIGH', 'NORMAL', 'LOW') THEN
		RAISE EXCEPTION 'unknown lane "%" of branch "%"', lane, branch
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use high, normal or low, as verify_delivery() names them.';
	END IF;
	IF seqs IS NULL OR isempty(seqs) THEN
		RAISE EXCEPTION 'no numbers to resend'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass verify_delivery()''s missing_at_central.';
	END IF;
	SELECT l.* INTO target
	FROM softmobile.outbox_lane_state l JOIN softmobile.outbox_epoch e USING (epoch_no)
	WHERE l.branch_id = resend.branch AND l.priority = upper(resend.lane)
		AND (e.epoch = resend.epoch OR resend.epoch IS NULL AND e.registered)
	ORDER BY l.epoch_no DESC LIMIT 1;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'branch "%" has no such lane in epoch %', branch, epoch
			USING ERRCODE = 'undefined_object', HINT = 'SELECT * FROM softmobile.outbox_epoch lists the epochs.';
	END IF;
	SELECT count(*) INTO events
	FROM unnest(target.settled_all * seqs) AS r (part)
		JOIN softmobile.outbox_event v ON v.lane_id = target.log_id AND v.seq >= lower(r.part) AND v.seq < upper(r.part)
	WHERE (target.log_id = target.lane_id OR v.branch_id = resend.branch)
		AND NOT EXISTS (SELECT FROM softmobile.outbox_exception x WHERE x.lane_id = target.lane_id AND x.seq = v.seq);
	IF events > 0 THEN
		INSERT INTO softmobile.outbox_request (kind, branch_id, lane_id, seqs, reason) VALUES ('resend', resend.branch, target.lane_id, resend.seqs, why);
		PERFORM softmobile.record_audit('resend', resend.branch, why, events, NULL,
			jsonb_build_object('lane', lower(lane), 'seqs', seqs::text), softmobile.calling_role());
		PERFORM softmobile.poke();
	END IF;
	RETURN events;
END
$$;
COMMENT ON FUNCTION softmobile.resend(text, text, int8multirange, text, uuid) IS
'Sends delivered events again that central has lost since (a restore at headquarters). lane: high, normal or low; seqs: numbers in the lane, as verify_delivery() reports them missing; epoch NULL: the current one. Returns how many events that will be; rolled-back numbers and events no longer kept are none. Takes effect after commit. Errors: 42704, 22023, 23514.';

/* For the worker. */

CREATE FUNCTION softmobile.snapshot_step(blocks bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	s softmobile.outbox_snapshot;
	upto bigint;
BEGIN
	-- Nobody's open transaction holds the worker up: not one that has detached the table, nor one that has locked it.
	SELECT * INTO s FROM softmobile.outbox_snapshot ORDER BY requested_at, relation LIMIT 1 FOR UPDATE SKIP LOCKED;
	IF NOT FOUND THEN
		RETURN false;
	END IF;
	upto := least(s.next_block + blocks, s.end_block);
	IF EXISTS (SELECT FROM pg_class c WHERE c.oid = s.relation) AND s.next_block < upto THEN
		PERFORM set_config('softmobile.branch_id', s.branch_id, true);
		IF softmobile.capture_existing(s.relation, s.next_block, upto, s.actor, s.reason) IS NULL THEN
			RETURN false;
		END IF;
	END IF;
	IF upto >= s.end_block THEN
		DELETE FROM softmobile.outbox_snapshot o WHERE o.relation = s.relation;
	ELSE
		UPDATE softmobile.outbox_snapshot o SET next_block = upto WHERE o.relation = s.relation;
	END IF;
	RETURN true;
END
$$;
COMMENT ON FUNCTION softmobile.snapshot_step(bigint) IS 'Internal, for the worker: queues the rows of some more blocks of a table attached with initial => ''snapshot''. Returns whether it could; try again later if not.';

CREATE FUNCTION softmobile.close_lanes() RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	-- The two epochs in use were opened together; a day later nobody remembers the ones before.
	opened record;
	n bigint;
BEGIN
	SELECT e.epoch_no - 1 AS first_no, e.opened_at INTO opened FROM softmobile.outbox_epoch e WHERE e.registered ORDER BY e.epoch_no DESC LIMIT 1;
	IF opened.opened_at > now() - interval '1 day' THEN
		RETURN 0;
	END IF;
	UPDATE softmobile.outbox_lane c SET closed = true
	FROM softmobile.outbox_lane_state l
	WHERE c.lane_id = l.lane_id AND NOT c.closed AND l.epoch_no < opened.first_no
		AND NOT EXISTS (SELECT FROM pg_locks k WHERE k.locktype = 'relation' AND k.relation = to_regclass(format('softmobile.lane_%s_seq', l.log_id)))
		AND NOT EXISTS (SELECT FROM softmobile.outbox_exception x WHERE x.lane_id = l.lane_id AND x.state IN ('failed', 'queued'))
		AND NOT EXISTS (SELECT FROM softmobile.outbox_event e
			WHERE e.lane_id = l.log_id AND e.seq >= l.first_open AND CASE
				WHEN l.branch_id IS NULL THEN NOT EXISTS (SELECT FROM softmobile.outbox_lane o WHERE o.log_id = l.lane_id AND o.branch_id = e.branch_id)
				ELSE NOT l.settled_all @> e.seq AND (l.log_id = l.lane_id OR e.branch_id = l.branch_id) END);
	GET DIAGNOSTICS n = ROW_COUNT;
	IF n > 0 THEN
		PERFORM softmobile.lanes_changed();
	END IF;
	RETURN n;
END
$$;
COMMENT ON FUNCTION softmobile.close_lanes() IS
'Internal, for the worker: closes lanes of older epochs that are drained and that nobody can write to any more. Returns how many.';

CREATE FUNCTION softmobile.empty_segment(segment integer) RETURNS void
LANGUAGE c VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'softmobile_empty_segment';
COMMENT ON FUNCTION softmobile.empty_segment(integer) IS 'Internal, for recycle_segments(): empties a segment of the log.';

CREATE FUNCTION softmobile.shrink_trash(blocks integer DEFAULT 8192) RETURNS boolean
LANGUAGE c VOLATILE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'softmobile_shrink_trash';
COMMENT ON FUNCTION softmobile.shrink_trash(integer) IS
'Internal, for the worker: gives a piece of what an emptied segment has left back to the system, so many blocks of 8 kB. Returns whether there is more.';

CREATE FUNCTION softmobile.recycle_segments(retention interval) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
-- Whoever reads a segment keeps it; nobody queues behind our attempt for longer than this.
SET lock_timeout = '50ms' SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
	cur softmobile.outbox_segment;
	next_one integer;
	old record;
	used boolean;
	newest timestamptz;
	waiting boolean;
BEGIN
	SELECT * INTO cur FROM softmobile.outbox_segment WHERE current;
	IF NOT FOUND THEN
		-- No row is written before it says more than none: a restore may be about to bring the dump's.
		cur := (1, true, coalesce((SELECT max(i.seen_at) FROM softmobile.outbox_identity i), now()), NULL);
	END IF;

	-- The oldest closed segment whose events are all delivered and old enough gives its disk back.
	FOR old IN SELECT * FROM softmobile.outbox_segment s WHERE s.closed_at < now() - retention ORDER BY s.closed_at LIMIT 1 LOOP
		-- Not event by event: whether there is one in what is open of each lane, and one of a branch that is not registered yet.
		EXECUTE format(
			'SELECT EXISTS (SELECT FROM softmobile.outbox_lane_state l CROSS JOIN LATERAL unnest(''{[1,)}''::int8multirange - l.settled_all) AS o (seqs)'
			' WHERE l.branch_id IS NOT NULL AND EXISTS (SELECT FROM softmobile.outbox_event_%1$s e WHERE e.lane_id = l.log_id'
			' AND e.seq >= lower(o.seqs) AND e.seq < coalesce(upper(o.seqs), 9223372036854775807) AND (l.log_id = l.lane_id OR e.branch_id = l.branch_id)))'
			' OR EXISTS (SELECT FROM softmobile.outbox_lane u JOIN softmobile.outbox_event_%1$s e ON e.lane_id = u.lane_id WHERE u.branch_id IS NULL'
			' AND NOT EXISTS (SELECT FROM softmobile.outbox_lane l WHERE l.log_id = u.lane_id AND l.branch_id = e.branch_id))', old.segment) INTO waiting;
		IF NOT waiting THEN
			BEGIN
				PERFORM softmobile.empty_segment(old.segment);
			EXCEPTION
				WHEN lock_not_available THEN
					RETURN format('segment %s is being read', old.segment);
				WHEN object_not_in_prerequisite_state THEN
					RETURN format('segment %s has to wait for the files of another one to be removed', old.segment);
			END;
			DELETE FROM softmobile.outbox_segment s WHERE s.segment = old.segment;
			DELETE FROM softmobile.outbox_tile t WHERE t.segment = old.segment;
			-- The ledger goes with the events that it tells of. Which numbers are void stays known, in one row of each lane.
			WITH gone AS (
				DELETE FROM softmobile.outbox_batch b WHERE b.settled_at < old.closed_at - retention
					AND b.batch_id <= (SELECT l.settled_batch FROM softmobile.outbox_lane l WHERE l.lane_id = b.lane_id)
				RETURNING b.*)
			INSERT INTO softmobile.outbox_batch (batch_id, lane_id, kind, members, last_seq, events, settled_at)
			SELECT min(g.batch_id), g.lane_id, 'void', range_agg(g.members), max(g.last_seq), 0, max(g.settled_at)
			FROM gone g WHERE g.kind = 'void' GROUP BY g.lane_id;
			RETURN format('segment %s emptied', old.segment);
		END IF;
	END LOOP;

	-- A new segment is opened three times in each retention, so that at most a third more than needed is kept.
	IF cur.opened_at < now() - retention / 3 THEN
		SELECT n INTO next_one FROM generate_series(1, 4) AS n
		WHERE n <> cur.segment AND NOT EXISTS (SELECT FROM softmobile.outbox_segment s WHERE s.segment = n) ORDER BY (n - cur.segment + 4) % 4 LIMIT 1;
		EXECUTE format('SELECT EXISTS (SELECT FROM softmobile.outbox_event_%s)', cur.segment) INTO used;
		IF next_one IS NOT NULL AND used THEN
			INSERT INTO softmobile.outbox_segment (segment, current, opened_at, closed_at) VALUES (cur.segment, false, cur.opened_at, now())
			ON CONFLICT ON CONSTRAINT outbox_segment_pkey DO UPDATE SET current = false, closed_at = now();
			INSERT INTO softmobile.outbox_segment (segment, current, opened_at) VALUES (next_one, true, now());
			PERFORM softmobile.lanes_changed();
			RETURN format('segment %s opened', next_one);
		END IF;
	END IF;
	RETURN NULL;
END
$$;
COMMENT ON FUNCTION softmobile.recycle_segments(interval) IS
'Internal, for the worker: opens a new segment of the log when the current one is old, and empties the oldest once all of its events are delivered and older than the retention. Returns what it did, or NULL. A segment that somebody is reading is left for the next time.';
