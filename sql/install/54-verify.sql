/*
 * The proof of no loss: which numbers of each lane this branch has sent and which are
 * void, against what central has received and was told, and then what the events say.
 *
 * verify_delivery() is for people and runs in the caller's transaction.  The worker
 * compares the numbers alone, by verify_question() and take_verification(), when it
 * begins, when the link comes back, and once in every softmobile.sync_interval; that
 * is also how central learns of void numbers, and how a database that was set back
 * notices that its numbers were used before.
 */

CREATE TABLE softmobile.outbox_verification (
	branch_id text COLLATE "C" PRIMARY KEY REFERENCES softmobile.branch ON DELETE CASCADE,
	verified_at timestamptz NOT NULL,
	missing bigint NOT NULL,
	unknown bigint NOT NULL,
	forks bigint NOT NULL
);
COMMENT ON TABLE softmobile.outbox_verification IS 'What the worker''s last comparison of numbers with central found, by branch. Never dumped: it is true of this database only.';
COMMENT ON COLUMN softmobile.outbox_verification.missing IS 'Numbers that central acknowledged and does not have: it was restored; verify_delivery() names them, resend() sends them again.';
COMMENT ON COLUMN softmobile.outbox_verification.unknown IS 'Numbers that central has from this branch and this database does not: it was restored or set back.';
COMMENT ON COLUMN softmobile.outbox_verification.forks IS 'Numbers that reached central with two events: two servers send as this branch.';

CREATE FUNCTION softmobile.lane_numbers(branch text) RETURNS TABLE (lane_id integer, log_id integer, epoch_no integer, epoch uuid, lane text, highest bigint,
	sent int8multirange, void int8multirange, settled int8multirange)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT l.lane_id, l.log_id, l.epoch_no, e.epoch, lower(l.priority), h.highest, l.settled_all - v.seqs - x.seqs, v.seqs, l.settled_all
	FROM softmobile.outbox_lane_state l
		JOIN softmobile.outbox_epoch e USING (epoch_no)
		-- The sequence of a lane that came with a dump is not there, but nobody writes to it either.
		CROSS JOIN LATERAL (
			SELECT greatest(coalesce(pg_sequence_last_value(to_regclass(format('softmobile.lane_%s_seq', l.log_id))),
					(SELECT max(o.seq) FROM softmobile.outbox_event o WHERE o.lane_id = l.log_id), 0),
				coalesce(upper(l.settled_all) - 1, 0)) AS highest) AS h
		CROSS JOIN LATERAL (
			SELECT coalesce(range_agg(b.members), '{}') AS seqs FROM softmobile.outbox_batch b
			WHERE b.lane_id = l.lane_id AND b.kind = 'void') AS v
		-- Central has an event in conflict; one that it rejected, and those behind it, it does not have.
		CROSS JOIN LATERAL (
			SELECT coalesce(range_agg(int8range(r.seq, r.seq + 1)), '{}') AS seqs FROM softmobile.outbox_exception r
			WHERE r.lane_id = l.lane_id AND r.kind <> 'conflict' AND r.state <> 'delivered') AS x
	WHERE l.branch_id = branch;
END;
COMMENT ON FUNCTION softmobile.lane_numbers(text) IS
'Internal: of each lane of a branch, the highest number used, the numbers that central acknowledged, those that are void, and all that are settled.';

-- Not by the highest number used: after a crash, a recovery to a point in time or a promotion the sequence stands up to 32 numbers
-- further than the events do.
CREATE FUNCTION softmobile.unknown_numbers(log integer, settled int8multirange, void int8multirange, received int8multirange) RETURNS int8multirange
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT c.seqs - coalesce(range_agg(int8range(o.seq, o.seq + 1)) FILTER (WHERE o.seq IS NOT NULL), '{}')
	FROM (SELECT coalesce(received, '{}') - (coalesce(settled, '{}') - coalesce(void, '{}')) AS seqs) AS c
		LEFT JOIN LATERAL unnest(c.seqs) AS r ON true
		LEFT JOIN softmobile.outbox_event o ON o.lane_id = log AND o.seq >= lower(r) AND o.seq < upper(r)
	GROUP BY c.seqs;
END;
COMMENT ON FUNCTION softmobile.unknown_numbers(integer, int8multirange, int8multirange, int8multirange) IS
'Internal: which of the numbers that central received are no event of this database: neither settled, unless void, nor in the log.';

CREATE FUNCTION softmobile.verify_question(branch text, after_batch bigint, OUT question json, OUT upto_batch bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	SELECT coalesce(max(b.batch_id), 0) INTO upto_batch FROM softmobile.outbox_batch b;
	SELECT json_build_object('branch', branch, 'lanes', coalesce(json_agg(json_build_object(
			'epoch', n.epoch, 'epoch_no', n.epoch_no, 'lane', n.lane, 'highest', n.highest, 'void', v.seqs)), '[]'))
	INTO question
	FROM softmobile.lane_numbers(branch) AS n
		CROSS JOIN LATERAL (
			SELECT coalesce(range_agg(b.members), '{}') AS seqs FROM softmobile.outbox_batch b
			WHERE b.lane_id = n.lane_id AND b.kind = 'void' AND b.batch_id > after_batch) AS v
	WHERE n.highest > 0;
END
$$;
COMMENT ON FUNCTION softmobile.verify_question(text, bigint) IS
'Internal: the body of POST /verify for a branch, numbers only. Void numbers are told that were written down after ledger row after_batch; upto_batch: the ledger''s last row.';

CREATE FUNCTION softmobile.lanes_of_answer(answer jsonb) RETURNS TABLE (epoch uuid, epoch_no integer, lane text, received int8multirange, void int8multirange, forks bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF jsonb_typeof(answer) IS DISTINCT FROM 'object' OR jsonb_typeof(answer -> 'lanes') IS DISTINCT FROM 'array' THEN
		RAISE EXCEPTION 'central''s answer names no lanes'
			USING ERRCODE = 'protocol_violation', HINT = 'Check that softmobile.central_url is the central server, and that it is as new as this one.';
	END IF;
	IF EXISTS (SELECT FROM jsonb_array_elements(answer -> 'lanes') AS a WHERE a ->> 'epoch' IS NULL OR (a ->> 'lane' IN ('high', 'normal', 'low')) IS NOT TRUE) THEN
		RAISE EXCEPTION 'central''s answer has a lane without a name'
			USING ERRCODE = 'protocol_violation', HINT = 'Check that the central server is as new as this one.';
	END IF;
	RETURN QUERY
		SELECT (a ->> 'epoch')::uuid, (a ->> 'epoch_no')::integer, a ->> 'lane', coalesce((a ->> 'received')::int8multirange, '{}'),
			coalesce((a ->> 'void')::int8multirange, '{}'), coalesce((a ->> 'forks')::bigint, 0)
		FROM jsonb_array_elements(answer -> 'lanes') AS a;
EXCEPTION WHEN data_exception THEN
	RAISE EXCEPTION 'central''s answer cannot be read: %', SQLERRM
		USING ERRCODE = 'protocol_violation', HINT = 'Check that the central server is as new as this one.';
END
$$;
COMMENT ON FUNCTION softmobile.lanes_of_answer(jsonb) IS 'Internal: central''s lanes, from its answer to POST /verify. Error: 08P01.';

CREATE FUNCTION softmobile.count_numbers(seqs int8multirange) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
RETURN (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint FROM unnest(seqs) AS r);
COMMENT ON FUNCTION softmobile.count_numbers(int8multirange) IS 'Internal: how many numbers a multirange holds.';

CREATE FUNCTION softmobile.take_verification(branch text, answer text, OUT why text, OUT missing bigint, OUT unknown bigint, OUT forks bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	-- The two epochs in use; numbers of older ones are not drawn any more.
	current_no integer := (SELECT max(e.epoch_no) - 1 FROM softmobile.outbox_epoch e WHERE e.registered);
BEGIN
	BEGIN
		PERFORM softmobile.lanes_of_answer(answer::jsonb);
	EXCEPTION WHEN data_exception OR program_limit_exceeded OR protocol_violation THEN
		RETURN;
	END;
	SELECT coalesce(sum(softmobile.count_numbers(n.sent - coalesce(a.received, '{}'))), 0),
		coalesce(sum(softmobile.count_numbers(softmobile.unknown_numbers(n.log_id, n.settled, n.void, a.received))), 0),
		coalesce(sum(a.forks), 0),
		min(format('central has number %s of lane %s, this database has used no more than %s', upper(a.received) - 1, a.lane, n.highest))
			FILTER (WHERE n.epoch_no >= current_no AND upper(a.received) - 1 > n.highest)
	INTO missing, unknown, forks, why
	FROM softmobile.lane_numbers(branch) AS n
		FULL JOIN softmobile.lanes_of_answer(answer::jsonb) AS a USING (epoch, lane);
	INSERT INTO softmobile.outbox_verification AS v (branch_id, verified_at, missing, unknown, forks)
	VALUES (branch, now(), missing, unknown, forks)
	ON CONFLICT (branch_id) DO UPDATE
	SET verified_at = excluded.verified_at, missing = excluded.missing, unknown = excluded.unknown, forks = excluded.forks;
END
$$;
COMMENT ON FUNCTION softmobile.take_verification(text, text) IS
'Internal, for the worker: what central''s answer to POST /verify means. why: a new epoch is needed, because numbers would be used twice. All NULL: it is no answer of ours.';

/* Contents. */

CREATE FUNCTION softmobile.content_blocks(branch text) RETURNS TABLE (n bigint, epoch uuid, lane text, from_seq bigint, to_seq bigint, first_id uuid, last_id uuid,
	members int8multirange, digest text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT row_number() OVER (ORDER BY d.epoch_no, d.lane, d.block), d.epoch, d.lane, d.block * 4096 + 1, d.block * 4096 + 4097,
		(array_agg(d.id ORDER BY d.id))[1], (array_agg(d.id ORDER BY d.id DESC))[1], range_agg(int8range(d.seq, d.seq + 1)),
		encode(sha256(convert_to(string_agg(d.digest, '' ORDER BY d.seq, d.id), 'UTF8')), 'hex')
	FROM (
		SELECT s.epoch_no, s.epoch, s.lane, (e.seq - 1) / 4096 AS block, e.seq, e.id, softmobile.event_digest(e.id, t.entity_type, e.entity_id,
			CASE e.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END, e.actor, e.reason, e.payload) AS digest
		FROM softmobile.lane_numbers(branch) AS s
			JOIN softmobile.outbox_event e ON e.lane_id = s.log_id AND s.sent @> e.seq
			JOIN softmobile.outbox_entity t USING (entity_no)) AS d
	GROUP BY d.epoch_no, d.epoch, d.lane, d.block;
END;
COMMENT ON FUNCTION softmobile.content_blocks(text) IS
'Internal: the delivered events that are still in the log, in blocks of 4,096 numbers of a lane, with the digest of each block.';

CREATE FUNCTION softmobile.altered_events(branch text) RETURNS TABLE (epoch uuid, lane text, id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	-- Blocks in one request; central may take softmobile.request_timeout for each.
	per_request CONSTANT integer := 32;
	blocks json[] := ARRAY(SELECT json_build_object('epoch', b.epoch, 'lane', b.lane, 'from', b.from_seq, 'to', b.to_seq,
			'first_id', b.first_id, 'last_id', b.last_id, 'members', b.members, 'digest', b.digest)
		FROM softmobile.content_blocks(branch) AS b ORDER BY b.n);
	differing jsonb := '[]';
	answer jsonb;
BEGIN
	FOR i IN 0 .. (cardinality(blocks) - 1) / per_request LOOP
		EXIT WHEN cardinality(blocks) = 0;
		answer := softmobile.ask_json(branch, '/verify', json_build_object('branch', branch, 'lanes', '[]'::json,
			'contents', array_to_json(blocks[i * per_request + 1 : (i + 1) * per_request])));
		differing := differing || coalesce(answer -> 'contents', '[]');
	END LOOP;
	FOR i IN 0 .. jsonb_array_length(differing) - 1 LOOP
		-- The ids with which the block was asked for stand in the question.
		answer := softmobile.ask_json(branch, '/verify', json_build_object('branch', branch, 'lanes', '[]'::json, 'events', ARRAY(
			SELECT b FROM unnest(blocks) AS b
			WHERE (b ->> 'epoch', b ->> 'lane', b ->> 'from') = (differing -> i ->> 'epoch', differing -> i ->> 'lane', differing -> i ->> 'from'))));
		RETURN QUERY
			SELECT (d ->> 'epoch')::uuid, d ->> 'lane', e.id
			FROM jsonb_array_elements(answer -> 'events') AS d
				JOIN softmobile.lane_numbers(branch) AS s ON s.epoch = (d ->> 'epoch')::uuid AND s.lane = d ->> 'lane'
				JOIN softmobile.outbox_event e ON e.lane_id = s.log_id AND e.seq >= (d ->> 'from')::bigint AND e.seq < (d ->> 'to')::bigint AND s.sent @> e.seq
				JOIN softmobile.outbox_entity t USING (entity_no)
				-- An event that central does not have is missing; here are those that it has otherwise.
				JOIN ROWS FROM (jsonb_array_elements_text(d -> 'ids'), jsonb_array_elements_text(d -> 'digests')) AS c (id, digest) ON c.id::uuid = e.id
			WHERE c.digest <> softmobile.event_digest(e.id, t.entity_type, e.entity_id,
				CASE e.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END, e.actor, e.reason, e.payload);
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.altered_events(text) IS
'Internal: delivered events that central holds with another content. Blocks of events are compared by digest, and single events only where these differ. Errors as ask_json().';

CREATE FUNCTION softmobile.verify_delivery(branch text, contents boolean DEFAULT true)
RETURNS TABLE (epoch uuid, lane text, sent int8multirange, void int8multirange, received int8multirange, missing_at_central int8multirange,
	unknown_here int8multirange, equal boolean, altered uuid[], forks bigint, opened_at timestamptz)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	here jsonb;
	answer jsonb;
	changed jsonb := '{}';
BEGIN
	IF branch IS NULL THEN
		RAISE EXCEPTION 'no branch given'
			USING ERRCODE = 'null_value_not_allowed', HINT = 'SELECT branch_id FROM softmobile.sync_overview lists them.';
	END IF;
	PERFORM softmobile.known_branch(branch);
	-- First what was sent, then what has arrived: more may arrive meanwhile.
	SELECT coalesce(jsonb_agg(n), '[]') INTO here FROM softmobile.lane_numbers(branch) AS n;
	answer := softmobile.ask_json(branch, '/verify', (SELECT q.question FROM softmobile.verify_question(branch, 0) AS q));
	IF contents THEN
		SELECT coalesce(jsonb_object_agg(a.epoch || ' ' || a.lane, a.ids), '{}') INTO changed
		FROM (SELECT x.epoch, x.lane, array_agg(x.id ORDER BY x.id) AS ids FROM softmobile.altered_events(branch) AS x GROUP BY 1, 2) AS a;
	END IF;
	RETURN QUERY
		SELECT w.epoch, w.lane, w.sent, w.void, w.received, w.missing, w.unknown,
			isempty(w.missing) AND isempty(w.unknown) AND w.void = w.void_there AND cardinality(w.altered) = 0 AND w.forks = 0,
			w.altered, w.forks, w.opened_at
		FROM (
			SELECT epoch, lane, coalesce(n.sent, '{}') AS sent, coalesce(n.void, '{}') AS void, coalesce(a.received, '{}') AS received,
				coalesce(n.sent - coalesce(a.received, '{}'), '{}') AS missing,
				softmobile.unknown_numbers(n.log_id, n.settled, n.void, a.received) AS unknown,
				coalesce(a.void, '{}') AS void_there, coalesce(a.forks, 0) AS forks,
				ARRAY(SELECT i::uuid FROM jsonb_array_elements_text(changed -> (epoch || ' ' || lane)) AS i) AS altered,
				coalesce(n.epoch_no, a.epoch_no) AS epoch_no, o.opened_at
			FROM jsonb_to_recordset(here) AS n (epoch uuid, lane text, epoch_no integer, log_id integer, highest bigint, sent int8multirange, void int8multirange,
					settled int8multirange)
				FULL JOIN softmobile.lanes_of_answer(answer) AS a USING (epoch, lane)
				LEFT JOIN softmobile.outbox_epoch o USING (epoch)
			WHERE n.highest IS DISTINCT FROM 0 OR a.epoch_no IS NOT NULL) AS w
		ORDER BY w.epoch_no, array_position('{high,normal,low}', w.lane);
END
$$;
REVOKE ALL ON FUNCTION softmobile.verify_delivery(text, boolean) FROM PUBLIC;
COMMENT ON FUNCTION softmobile.verify_delivery(text, boolean) IS
'The proof of no loss. Per lane: sent, the numbers that central acknowledged; void, rolled back; received, what central has; missing_at_central, for resend(); unknown_here, what central has and this database does not (it was restored or set back); altered, events that central holds with another content; forks, numbers that reached central with two events. equal: nothing of the kind. What still waits is not in sent. contents false: numbers only. Contents are compared as long as events are kept (softmobile.retention), at a cost that grows with them. Errors: 42704 unknown branch; 08006, 08P01, 28000, 0A000, 08004, 55000 central cannot be asked or does not answer as it should.';
