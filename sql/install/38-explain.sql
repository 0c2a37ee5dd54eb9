/*
 * Where is this receipt?
 *
 * The row in the attached table names the entity; its event is looked for in the
 * log, which has no index on entities: first around the row's date, which the
 * BRIN indexes on ids find at any size of the log, then where else it can be,
 * and in all of the log only when nothing else is left.
 */

CREATE FUNCTION softmobile.moment(at timestamptz) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN to_char(at, 'YYYY-MM-DD HH24:MI:SS TZ');
COMMENT ON FUNCTION softmobile.moment(timestamptz) IS 'Internal: a time as sync_explain() writes it, in the session''s time zone.';

CREATE TYPE softmobile.receipt AS (
	relation regclass,
	entity_no integer,
	entity_id text,
	branch_id text,
	at timestamptz,
	slack interval
);
COMMENT ON TYPE softmobile.receipt IS 'Internal: a row with a folio. at: its date column, NULL: not known; slack: how far from it the row may have been inserted.';

CREATE FUNCTION softmobile.receipts_named(folio text, branch text, OUT receipts softmobile.receipt[], OUT tables text, OUT problems text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET row_security = off
SET TimeZone = 'UTC' SET DateStyle = 'ISO' SET IntervalStyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = 1
AS $$
DECLARE
	otherwise text := coalesce(nullif(softmobile.database_setting('softmobile.branch_id'), ''), current_database());
	c softmobile.captured_table;
	condition text;
	found softmobile.receipt[];
BEGIN
	receipts := '{}';
	-- As it stands, which an index may serve; if that finds none, without the blanks around it.
	FOR condition IN VALUES ('%s = %L'), ('btrim(%s) = btrim(%L)') LOOP
		FOR c IN SELECT t.* FROM softmobile.captured_table t WHERE t.folio_column IS NOT NULL ORDER BY t.relation::text LOOP
			BEGIN
				-- More than a hundred of one folio are not told one by one.
				SELECT array_agg(ROW(c.relation, c.entity_no, r.entity_id, r.branch_id, r.at,
					-- The time zone of a date or a timestamp without one is anybody's guess.
					CASE (softmobile.column_type(c.relation, c.date_column)).typname WHEN 'date' THEN '39 hours' WHEN 'timestamp' THEN '15 hours' ELSE '1 hour' END)::softmobile.receipt)
				INTO found
				FROM softmobile.read_as_owner(c.relation, format('SELECT %s, %s, %s FROM %s AS t WHERE %s LIMIT 101',
					softmobile.entity_id_of(c), softmobile.branch_of(c, otherwise),
					CASE WHEN softmobile.column_kind(c.relation, c.date_column) = 'date' THEN format('t.%I::timestamptz', c.date_column) ELSE 'NULL::timestamptz' END,
					c.relation,
					concat_ws(' AND ', format(condition, softmobile.column_text(c.relation, c.folio_column, 'id'), folio), softmobile.rows_of_its_own(c.relation),
						softmobile.branch_of(c, otherwise) || ' = ' || quote_literal(branch)))) AS r (entity_id text, branch_id text, at timestamptz);
				receipts := receipts || found;
			EXCEPTION WHEN OTHERS THEN
				problems := coalesce(problems || ', ', '') || format('%s (%s)', c.relation, SQLERRM);
			END;
		END LOOP;
		EXIT WHEN cardinality(receipts) > 0 OR problems IS NOT NULL;
	END LOOP;
	tables := (SELECT string_agg(t.relation::text, ', ' ORDER BY t.relation::text) FROM softmobile.captured_table t WHERE t.folio_column IS NOT NULL);
END
$$;
COMMENT ON FUNCTION softmobile.receipts_named(text, text) IS
'Internal: the rows of attached tables that have a folio, of one branch or (NULL) all; which tables have folios, and which of them could not be read.';

CREATE FUNCTION softmobile.kept_since() RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	-- The first segment is never opened a quarter of the retention after the installation; a later one is never opened before.
	SELECT coalesce(max(s.opened_at), '-infinity')
	FROM (SELECT min(g.opened_at) AS opened_at FROM softmobile.outbox_segment g) AS s
	WHERE s.opened_at > (SELECT min(e.opened_at) FROM softmobile.outbox_epoch e) + current_setting('softmobile.retention')::interval / 4
		-- Nor is the first one where the worker came late: it holds older events.  Only the first pages of the segments are read.
		AND NOT EXISTS (
			SELECT FROM softmobile.outbox_event e WHERE e.ctid < '(10,0)' AND e.created_at < s.opened_at - interval '1 hour');
END;
COMMENT ON FUNCTION softmobile.kept_since() IS 'Internal: since when the log is complete; what is older was purged. -infinity: nothing was purged yet.';

CREATE FUNCTION softmobile.inserted_between(entity_no integer, entity_id text, "from" timestamptz, "to" timestamptz) RETURNS softmobile.outbox_event
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT e FROM softmobile.outbox_event e
	WHERE e.id >= (lpad(to_hex(floor(extract(epoch FROM "from") * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
		AND e.id <= (lpad(to_hex(floor(extract(epoch FROM "to") * 1000)::bigint), 12, '0') || repeat('f', 20))::uuid
		AND e.entity_no = inserted_between.entity_no AND e.entity_id = inserted_between.entity_id AND e.op = 'i'
	ORDER BY e.created_at DESC LIMIT 1;
END;
COMMENT ON FUNCTION softmobile.inserted_between(integer, text, timestamptz, timestamptz) IS 'Internal: the last insert event of an entity that was captured in this time.';

CREATE FUNCTION softmobile.event_of(r softmobile.receipt) RETURNS softmobile.outbox_event
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	e softmobile.outbox_event;
	attached_at timestamptz := (SELECT c.attached_at FROM softmobile.captured_table c WHERE c.relation = r.relation);
	dated boolean := coalesce(r.at > timestamptz '1970-01-03 00:00:00+00' AND r.at < timestamptz '9999-01-01 00:00:00+00', false);
BEGIN
	IF dated THEN
		e := softmobile.inserted_between(r.entity_no, r.entity_id, r.at - r.slack, r.at + r.slack);
		IF e.id IS NOT NULL THEN
			RETURN e;
		END IF;
	END IF;
	-- Rows that were there already were queued with attach(initial => 'snapshot'), in a LOW lane.
	IF NOT dated OR r.at < attached_at + r.slack THEN
		SELECT s.* INTO e FROM softmobile.outbox_lane l JOIN softmobile.outbox_event s ON s.lane_id = l.lane_id
		WHERE l.priority = 'LOW' AND l.log_id = l.lane_id AND s.op = 's' AND s.entity_no = r.entity_no AND s.entity_id = r.entity_id
		ORDER BY s.created_at DESC LIMIT 1;
		IF e.id IS NOT NULL THEN
			RETURN e;
		END IF;
	END IF;
	IF NOT dated OR r.at + r.slack >= greatest(softmobile.kept_since(), attached_at) THEN
		SELECT a.* INTO e FROM softmobile.outbox_event a
		WHERE a.entity_no = r.entity_no AND a.entity_id = r.entity_id AND a.op = 'i'
		ORDER BY a.created_at DESC LIMIT 1;
	END IF;
	RETURN e;
END
$$;
COMMENT ON FUNCTION softmobile.event_of(softmobile.receipt) IS 'Internal: the event that tells headquarters of a row, as long as it is kept. NULL: there is none.';

CREATE FUNCTION softmobile.tell_exception(x softmobile.outbox_exception) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	first softmobile.outbox_exception;
BEGIN
	RETURN CASE
		WHEN x.state = 'delivered' THEN format('is at headquarters, who took it at %s after it had %s', softmobile.moment(x.updated_at),
			CASE x.kind WHEN 'waiting' THEN 'waited behind an earlier change' WHEN 'conflict' THEN 'been in conflict' ELSE 'been rejected' END)
		WHEN x.state = 'dropped' THEN format('was in conflict, which was decided in favour of headquarters at %s; they keep their own version', softmobile.moment(x.updated_at))
		WHEN x.state = 'queued' THEN format('has waited since %s and is sent next', softmobile.moment(x.created_at))
		WHEN x.kind = 'conflict' THEN format('has been in conflict since %s, because headquarters hold another version of it; it waits until somebody decides with softmobile.resolve_conflict(%L, ...)',
			softmobile.moment(x.recorded_at), x.id)
		WHEN x.kind = 'rejected' THEN format('was rejected by headquarters at %s (%s, attempt %s of %s); %s', softmobile.moment(x.last_attempt_at), regexp_replace(x.error_message, '^rejected: ', ''),
			x.attempt_count, current_setting('softmobile.max_attempts'),
			CASE WHEN x.attempt_count < current_setting('softmobile.max_attempts')::integer AND x.next_attempt_at IS NOT NULL
				THEN 'it will be tried again at ' || softmobile.moment(x.next_attempt_at)
				ELSE format('it waits until somebody mends the cause and calls softmobile.sync_outbox_retry(%L, ...)', ARRAY[x.id]) END)
		ELSE format('has waited since %s behind an earlier change of the same row', softmobile.moment(x.created_at)) END
		|| coalesce((SELECT ', which ' || softmobile.tell_exception(f) FROM softmobile.outbox_exception f
			WHERE f.id = x.waits_for AND x.kind = 'waiting' AND x.state = 'failed' AND f.kind <> 'waiting'), '');
END
$$;
COMMENT ON FUNCTION softmobile.tell_exception(softmobile.outbox_exception) IS 'Internal, for sync_explain(): what became of an event that central did not accept at once.';

CREATE FUNCTION softmobile.tell_waiting(branch text, lane softmobile.outbox_lane_state, seq bigint) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	b softmobile.branch;
	worker record;
	failed softmobile.outbox_lane_state;
	down_since timestamptz := (SELECT k.since FROM softmobile.link_state k WHERE k.branch_id = branch AND k.state = 'down');
BEGIN
	SELECT * INTO b FROM softmobile.branch k WHERE k.branch_id = branch;
	SELECT * INTO worker FROM softmobile.worker_status();
	-- The failed batch that it is in, else another of its branch: while that cannot be sent, neither can this.
	SELECT * INTO failed FROM softmobile.outbox_lane_state l
	WHERE l.branch_id = branch AND l.status = 'failed' ORDER BY l.failed @> seq AND l.lane_id = lane.lane_id DESC, l.last_attempt_at DESC LIMIT 1;
	RETURN CASE
		WHEN b.branch_id IS NULL THEN 'its branch is not registered yet, and it is sent when the worker, or somebody with softmobile.register_branch(), has registered it'
		WHEN NOT b.active THEN 'the delivery of its branch is switched off, and it is sent when softmobile.register_branch(..., active => true) switches it on'
		WHEN coalesce(nullif(b.central_url, ''), nullif(softmobile.database_setting('softmobile.central_url'), '')) IS NULL THEN
			'no central_url is set, and nothing is sent until one is'
		WHEN NOT worker.running THEN format('no worker is running%s, and nothing is sent until one does', ' (' || worker.detail || ')')
		WHEN down_since IS NOT NULL OR failed.error_message = 'offline' THEN
			format('headquarters have been out of reach since %s, and it is sent by itself as soon as they answer', softmobile.moment(coalesce(down_since, failed.first_attempt_at)))
		WHEN failed.lane_id IS NOT NULL THEN format('the last attempt%s, at %s, failed (%s), and it will be tried again%s',
			CASE WHEN failed.lane_id = lane.lane_id AND failed.failed @> seq THEN ' of its batch' ELSE ' of its branch' END,
			softmobile.moment(failed.last_attempt_at), failed.error_message, ' at ' || softmobile.moment(failed.next_attempt_at))
		WHEN lane.first_open < seq THEN format('up to %s events are sent before it', seq - lane.first_open)
		ELSE 'it is sent next' END;
END
$$;
COMMENT ON FUNCTION softmobile.tell_waiting(text, softmobile.outbox_lane_state, bigint) IS 'Internal, for sync_explain(): why an event waits, and until when.';

CREATE FUNCTION softmobile.tell_event(e softmobile.outbox_event) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	lane softmobile.outbox_lane_state;
	x softmobile.outbox_exception;
	delivered softmobile.outbox_batch;
BEGIN
	SELECT * INTO x FROM softmobile.outbox_exception o WHERE o.id = e.id;
	IF FOUND THEN
		RETURN softmobile.tell_exception(x);
	END IF;
	-- Events of a branch that was not registered are delivered through a lane that it was given later.
	SELECT l.* INTO lane FROM softmobile.outbox_lane_state l
	WHERE l.log_id = e.lane_id AND l.branch_id IS NOT NULL AND (l.log_id = l.lane_id OR l.branch_id = e.branch_id);
	IF lane.settled_all @> e.seq THEN
		delivered := softmobile.ledger_of(lane.lane_id, e.seq);
		RETURN CASE WHEN delivered.batch_id IS NULL THEN 'is at headquarters'
			ELSE format('is at headquarters: it was delivered at %s in batch %s%s', softmobile.moment(delivered.settled_at), delivered.batch_id,
				CASE WHEN delivered.attempt_count > 1 THEN ', at attempt ' || delivered.attempt_count END) END;
	END IF;
	RETURN format('has waited since %s: %s', softmobile.moment(e.created_at), softmobile.tell_waiting(coalesce(lane.branch_id, e.branch_id), lane, e.seq));
END
$$;
COMMENT ON FUNCTION softmobile.tell_event(softmobile.outbox_event) IS 'Internal, for sync_explain(): where an event is and what happens next.';

CREATE FUNCTION softmobile.tell_later(r softmobile.receipt, after softmobile.outbox_event) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT '; a later change of it ' || coalesce(
		(SELECT CASE WHEN x.waits_for = after.id AND x.state = 'failed' THEN 'waits behind that' ELSE softmobile.tell_exception(x) END
		 FROM softmobile.outbox_exception x
		 WHERE x.branch_id = r.branch_id AND x.entity_no = r.entity_no AND x.entity_id = r.entity_id AND x.state IN ('failed', 'queued') AND x.id <> after.id
		 ORDER BY x.created_at LIMIT 1),
		-- Of a long queue only the beginning is looked at.
		(SELECT softmobile.tell_event(w.event)
		 FROM softmobile.outbox_lane_state l CROSS JOIN LATERAL (
			SELECT e AS event FROM softmobile.outbox_event e
			WHERE e.lane_id = l.log_id AND e.seq >= l.first_open ORDER BY e.seq LIMIT 10000) AS w
		 WHERE l.branch_id = r.branch_id AND NOT l.closed AND NOT l.settled_all @> (w.event).seq
			AND (w.event).entity_no = r.entity_no AND (w.event).entity_id = r.entity_id AND (w.event).id <> after.id
		 ORDER BY (w.event).created_at LIMIT 1));
END;
COMMENT ON FUNCTION softmobile.tell_later(softmobile.receipt, softmobile.outbox_event) IS 'Internal, for sync_explain(): what a later change of a row waits for. NULL: none is known to wait.';

CREATE FUNCTION softmobile.tell_uncaptured(r softmobile.receipt) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	attached_at timestamptz := (SELECT c.attached_at FROM softmobile.captured_table c WHERE c.relation = r.relation);
	oldest timestamptz := softmobile.kept_since();
	-- How far from the date column the moment may be that it means: its time zone, where it has none, is anybody's guess.
	blur interval := CASE WHEN r.slack > interval '1 hour' THEN r.slack ELSE interval '0' END;
	flag text := (SELECT 'softmobile.enable_' || t.flag FROM softmobile.outbox_entity t WHERE t.entity_no = r.entity_no);
BEGIN
	IF EXISTS (SELECT FROM softmobile.outbox_snapshot s WHERE s.root = r.relation) THEN
		RETURN format('is in %s and has not been queued yet, which the worker is doing with the rows that were there when the table was attached', r.relation);
	END IF;
	IF r.at + blur < attached_at THEN
		RETURN format('was in %s before the table was attached at %s, and was not queued then; only changes made to it since are sent', r.relation, softmobile.moment(attached_at));
	END IF;
	IF r.at < oldest OR r.at IS NULL AND attached_at < oldest THEN
		RETURN format('is in %s, and its event has been purged%s: the log begins at %s, and what is older has been delivered to headquarters', r.relation,
			CASE WHEN r.at IS NULL THEN ', or it was never captured' ELSE '' END, softmobile.moment(oldest));
	END IF;
	RETURN format('is in %s, but was not captured: %s%s; nothing will be sent until the row is changed', r.relation,
		CASE WHEN (r.at - blur < attached_at) IS NOT FALSE THEN format('it was there before the table was attached at %s, or ', softmobile.moment(attached_at)) END,
		CASE WHEN NOT current_setting(flag)::boolean THEN format('%s is off', flag)
			WHEN EXISTS (SELECT FROM softmobile.tree_of(r.relation) AS t JOIN pg_trigger g ON g.tgrelid = t
						 WHERE g.tgfoid = 'softmobile.capture()'::regprocedure AND g.tgenabled NOT IN ('O', 'A')) THEN 'the capture trigger of the table is disabled'
			ELSE 'the capture trigger did not fire when it was stored' END);
END
$$;
COMMENT ON FUNCTION softmobile.tell_uncaptured(softmobile.receipt) IS 'Internal, for sync_explain(): why there is no event of a row.';

CREATE FUNCTION softmobile.sync_explain(folio text, branch text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	rows record;
	entity text;
	r softmobile.receipt;
	e softmobile.outbox_event;
	told text[] := '{}';
	among text := CASE WHEN branch IS NOT NULL THEN ' of branch ' || branch ELSE '' END;
	unread text;
BEGIN
	IF coalesce(btrim(folio), '') = '' THEN
		RAISE EXCEPTION 'a folio is needed'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Give the folio that is printed on the receipt: softmobile.sync_explain(''A-17'').';
	END IF;
	PERFORM softmobile.known_branch(branch);
	rows := softmobile.receipts_named(folio, branch);
	folio := btrim(folio);
	unread := coalesce('; not looked at, because it cannot be read: ' || rows.problems, '');
	IF rows.tables IS NULL THEN
		RETURN format('Receipt %s cannot be looked for: no attached table has a folio column; name it in softmobile.attach(..., folio_column => ...).', folio);
	END IF;
	IF cardinality(rows.receipts) = 0 THEN
		RETURN format('Receipt %s%s is in no attached table (%s)%s%s.', folio, among, rows.tables,
			coalesce((SELECT format('; a row with this folio that is not there any more, %s %s of branch %s, %s', t.entity_type, x.entity_id, x.branch_id, softmobile.tell_exception(x))
				FROM softmobile.outbox_exception x JOIN softmobile.outbox_entity t USING (entity_no)
				WHERE x.folio = folio AND x.branch_id = coalesce(branch, x.branch_id) AND x.state IN ('failed', 'queued') ORDER BY x.created_at LIMIT 1),
				': its sale was not stored here, or has been deleted since'), unread);
	END IF;
	FOREACH r IN ARRAY rows.receipts[1:5] LOOP
		e := softmobile.event_of(r);
		entity := format('%s %s of branch %s', (SELECT t.entity_type FROM softmobile.outbox_entity t WHERE t.entity_no = r.entity_no), r.entity_id, r.branch_id);
		told := told || format(CASE WHEN cardinality(rows.receipts) = 1 THEN '(%s) %s%s' ELSE '%s %s%s' END, entity,
			CASE WHEN e.id IS NULL THEN softmobile.tell_uncaptured(r) ELSE softmobile.tell_event(e) END, softmobile.tell_later(r, e));
	END LOOP;
	IF cardinality(rows.receipts) = 1 THEN
		RETURN format('Receipt %s %s%s.', folio, told[1], unread);
	END IF;
	RETURN format('%s receipts%s have the folio %s: %s%s%s.', CASE WHEN cardinality(rows.receipts) > 100 THEN 'More than 100' ELSE cardinality(rows.receipts)::text END, among, folio,
		array_to_string(told, '; '), CASE WHEN cardinality(rows.receipts) > 5 THEN '; and others' ELSE '' END, unread);
END
$$;
COMMENT ON FUNCTION softmobile.sync_explain(text, text) IS
'One sentence: where the receipt with this folio is (in its table, waiting, rejected, in conflict, at headquarters since when) and what happens next; branch NULL: of any branch. Errors: 22023 no folio, 42704 unknown branch.';
