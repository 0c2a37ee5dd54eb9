/*
 * What users see of the queue.
 *
 * An event's status is derived: it is an exception; or its number is settled; or
 * it is a member of its lane's failed batch; or it waits.  Each arm of
 * sync_outbox has a constant status, so that WHERE status = ... runs one arm.
 */

CREATE VIEW softmobile.outbox_lane_state AS
SELECT l.lane_id, l.branch_id, l.priority, l.epoch_no, l.log_id, l.closed, l.status, l.batch, l.batch_key, l.attempt_count,
	l.first_attempt_at, l.last_attempt_at, l.next_attempt_at, l.error_message, l.settled_batch,
	t.seqs IS NULL AS folded,
	a.settled_all,
	lower('{[1,)}'::int8multirange - a.settled_all) AS first_open,
	CASE WHEN l.status = 'failed' THEN l.batch - a.settled_all ELSE '{}'::int8multirange END AS failed
FROM softmobile.outbox_lane l
	LEFT JOIN LATERAL (
		SELECT range_agg(b.members) AS seqs
		FROM softmobile.outbox_batch b
		WHERE b.lane_id = l.lane_id AND b.batch_id > l.settled_batch) AS t ON true
	CROSS JOIN LATERAL (SELECT l.settled + coalesce(t.seqs, '{}'::int8multirange) AS settled_all OFFSET 0) AS a;
COMMENT ON VIEW softmobile.outbox_lane_state IS 'Lanes with the whole of what is settled (the ledger''s tail included), the first number that is not, and the members of the failed batch.';

CREATE FUNCTION softmobile.ledger_of(lane integer, seq bigint) RETURNS softmobile.outbox_batch
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	b softmobile.outbox_batch;
BEGIN
	-- In the order of the index; nearly always the first row is it.
	FOR b IN
		SELECT * FROM softmobile.outbox_batch g WHERE g.lane_id = ledger_of.lane AND g.last_seq >= ledger_of.seq
		ORDER BY g.lane_id, g.last_seq, g.batch_id
	LOOP
		IF b.members @> ledger_of.seq THEN
			RETURN b;
		END IF;
	END LOOP;
	RETURN NULL;
END
$$;
COMMENT ON FUNCTION softmobile.ledger_of(integer, bigint) IS 'The ledger row of an event: when and with how many attempts the batch was settled that it was in. NULL: not settled.';

-- Not SQL, which the planner would look into: it would expect so many numbers of a failed batch that it reads the whole log for them, or compiles the plan first.
CREATE FUNCTION softmobile.numbers_of(numbers int8multirange) RETURNS SETOF bigint
LANGUAGE plpgsql IMMUTABLE STRICT ROWS 10 SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	RETURN QUERY SELECT generate_series(lower(r), upper(r) - 1) FROM unnest(numbers) AS r;
END
$$;
COMMENT ON FUNCTION softmobile.numbers_of(int8multirange) IS 'The numbers in a bounded set, each for itself: the members of a batch.';

-- The lanes of unregistered branches deliver nothing themselves: what is in them counts in the lanes of the branches,
-- and until its branch has some, it waits.
CREATE VIEW softmobile.sync_outbox AS
SELECT x.id, x.branch_id, t.entity_type, x.entity_id,
	CASE x.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END AS operation,
	x.payload, x.reason, x.actor,
	CASE WHEN x.state = 'failed' THEN 'FAILED' WHEN x.state = 'queued' THEN 'PENDING' ELSE 'SENT' END AS status,
	l.priority, x.attempt_count, x.last_attempt_at, x.error_message,
	x.kind = 'conflict' AND x.state IN ('failed', 'queued') AS conflict_flag, x.created_at, x.updated_at
FROM softmobile.outbox_exception x JOIN softmobile.outbox_lane l USING (lane_id) JOIN softmobile.outbox_entity t USING (entity_no)
UNION ALL
SELECT e.id, l.branch_id, t.entity_type, e.entity_id,
	CASE e.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END,
	e.payload, e.reason, e.actor, 'FAILED', l.priority, l.attempt_count, l.last_attempt_at, l.error_message,
	false, e.created_at, coalesce(l.last_attempt_at, e.created_at)
FROM softmobile.outbox_lane_state l
	CROSS JOIN LATERAL softmobile.numbers_of(l.failed) AS n (seq)
	JOIN softmobile.outbox_event e ON e.lane_id = l.log_id AND e.seq = n.seq
	JOIN softmobile.outbox_entity t USING (entity_no)
WHERE l.branch_id IS NOT NULL AND (l.log_id = l.lane_id OR e.branch_id = l.branch_id)
UNION ALL
SELECT e.id, l.branch_id, t.entity_type, e.entity_id,
	CASE e.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END,
	e.payload, e.reason, e.actor, 'PENDING', l.priority, 0, NULL::timestamptz, NULL::text, false, e.created_at, e.created_at
FROM softmobile.outbox_lane_state l
	JOIN softmobile.outbox_event e ON e.lane_id = l.log_id AND e.seq >= l.first_open AND NOT l.settled_all @> e.seq AND NOT l.failed @> e.seq
	JOIN softmobile.outbox_entity t USING (entity_no)
WHERE l.branch_id IS NOT NULL AND (l.log_id = l.lane_id OR e.branch_id = l.branch_id)
UNION ALL
SELECT e.id, e.branch_id, t.entity_type, e.entity_id,
	CASE e.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END,
	e.payload, e.reason, e.actor, 'PENDING', u.priority, 0, NULL::timestamptz, NULL::text, false, e.created_at, e.created_at
FROM softmobile.outbox_lane u
	JOIN softmobile.outbox_event e ON e.lane_id = u.lane_id
	JOIN softmobile.outbox_entity t USING (entity_no)
WHERE u.branch_id IS NULL
	AND NOT EXISTS (SELECT FROM softmobile.outbox_lane l WHERE l.branch_id = e.branch_id AND l.log_id = u.lane_id)
UNION ALL
SELECT e.id, l.branch_id, t.entity_type, e.entity_id,
	CASE e.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END,
	e.payload, e.reason, e.actor, 'SENT', l.priority,
	(softmobile.ledger_of(l.lane_id, e.seq)).attempt_count, (softmobile.ledger_of(l.lane_id, e.seq)).last_attempt_at, NULL::text, false,
	e.created_at, (softmobile.ledger_of(l.lane_id, e.seq)).settled_at
FROM softmobile.outbox_lane_state l
	JOIN softmobile.outbox_event e ON e.lane_id = l.log_id AND l.settled_all @> e.seq
	JOIN softmobile.outbox_entity t USING (entity_no)
WHERE l.branch_id IS NOT NULL AND (l.log_id = l.lane_id OR e.branch_id = l.branch_id)
	AND NOT EXISTS (SELECT FROM softmobile.outbox_exception x WHERE x.lane_id = l.lane_id AND x.seq = e.seq);
COMMENT ON VIEW softmobile.sync_outbox IS 'Every event with its delivery status: PENDING, FAILED (error_message says why; offline: no link) or SENT. Cannot be edited: call sync_outbox_retry(), requeue_failed_outbox_entries() or resend().';
COMMENT ON COLUMN softmobile.sync_outbox.priority IS 'Of the lane that the event is in: rows that were there when the table was attached are LOW, and a new priority of an entity type does not change what waits already.';
COMMENT ON COLUMN softmobile.sync_outbox.attempt_count IS 'Attempts of the batch that the event is in; of a rejected event, its rejections.';
COMMENT ON COLUMN softmobile.sync_outbox.conflict_flag IS 'Central holds another version of the row; see sync_conflicts.';

CREATE VIEW softmobile.sync_history AS
SELECT s.id, s.branch_id, s.mode, s.status, s.started_at, s.finished_at, s.triggered_by, s.error_message, s.processed_events, s.differences_detected
FROM softmobile.sync_session s;
COMMENT ON VIEW softmobile.sync_history IS 'Sessions of each branch: ORDER BY id DESC shows the latest first.';
COMMENT ON COLUMN softmobile.sync_history.processed_events IS 'Events that central took in this session, those included that it had already.';
COMMENT ON COLUMN softmobile.sync_history.differences_detected IS 'Events that central answered as conflict or rejected.';

CREATE VIEW softmobile.sync_audit AS
SELECT a.id, a.at, a.action, a.branch_id, a.reason, a.events, a.ids, a.details, a.session_user_name, a.current_user_name, a.client_addr, a.application_name
FROM softmobile.audit a;
COMMENT ON VIEW softmobile.sync_audit IS 'Who did what to the queue, when, from where, and for what reason.';
