/*
 * Conflicts: the branch has changed a row that headquarters had changed too, and
 * somebody decides which version stands.
 *
 * An event in conflict stands in outbox_exception, with the row that central holds.
 * Later events of its entity wait behind it; some may not even have been read from
 * the log.  Whatever is decided, branch and central hold the same row in the end:
 *
 * local    The event is sent again with "resolution":"local".  Central takes its
 *          whole row, also where only headquarters had changed it.  What waited
 *          follows in order; each event fits the one before it, for all of them come
 *          from one row of one database.
 *
 * central  The caller's transaction brings central's row into the table.  That is
 *          captured like any change, as the entity's newest event: the adoption.
 *          Everything of the entity before it, the event in conflict and what waits
 *          behind it, is sent with "resolution":"central": central stores it and
 *          leaves its row alone.  The adoption goes with "resolution":"local",
 *          because the row may differ from central's in what the branch's triggers
 *          make of it (a time stamp), and that is no conflict.  The row that was
 *          changed is locked until commit, so all that is overruled was committed
 *          before the adoption, and all that comes after it knows central's row.
 *          When the row is equal already, it is updated without change, so that
 *          there is an adoption.
 *
 * Central has the last word: a decision holds for the row that central showed.  If
 * headquarters has changed it again since, the event (or the adoption) is in conflict
 * again, with the row of then, and somebody decides anew.  Nothing is overwritten that
 * nobody has seen.
 *
 * Rights: resolve_conflict() is written in C (conflict.c) and is SECURITY INVOKER.
 * It looks into our tables with the rights of the extension's owner, through the
 * internal functions below, and changes the application's table with the caller's,
 * under the caller's search_path, which the table's triggers may need.
 */

CREATE VIEW softmobile.sync_conflicts AS
SELECT x.id, x.branch_id, t.entity_type, x.entity_id,
	CASE x.op WHEN 'u' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'insert' END AS operation,
	f.field, f.old_value, f.local_value, f.central_value, x.folio, x.reason, x.actor,
	nullif(regexp_replace(x.error_message, '^conflict(: )?', ''), '') AS detail,
	x.created_at, coalesce(x.last_attempt_at, x.recorded_at) AS detected_at
FROM softmobile.outbox_exception x
	JOIN softmobile.outbox_entity t USING (entity_no)
	CROSS JOIN LATERAL (
		SELECT (x.payload -> 'old')::jsonb AS old, (x.payload -> 'new')::jsonb AS new,
			x.op = 'd' OR jsonb_typeof(x.central_row) IS DISTINCT FROM 'object' AS whole OFFSET 0) AS r
	LEFT JOIN LATERAL (
		SELECT '(row)' AS field, (coalesce(r.new, '{}') || r.old)::text AS old_value, coalesce(r.new::text, '(deleted)') AS local_value,
			CASE WHEN x.central_row = 'null' THEN '(deleted)' ELSE coalesce(x.central_row::text, '(not told)') END AS central_value
		WHERE r.whole
		UNION ALL
		SELECT k.field, CASE WHEN r.old ? k.field THEN r.old ->> k.field WHEN x.op = 'u' THEN r.new ->> k.field END, r.new ->> k.field, x.central_row ->> k.field
		FROM jsonb_object_keys(CASE WHEN NOT r.whole THEN r.new || x.central_row ELSE '{}' END) AS k (field)
		WHERE r.new -> k.field IS DISTINCT FROM x.central_row -> k.field) AS f ON true
WHERE x.kind = 'conflict' AND x.state = 'failed'
	AND NOT EXISTS (SELECT FROM softmobile.outbox_request q WHERE q.kind = 'resolve' AND x.id = ANY (q.ids));
COMMENT ON VIEW softmobile.sync_conflicts IS 'Conflicts that nobody has decided yet: one row for each field in which the branch''s row and central''s differ. Decide with resolve_conflict(id, ''local'' or ''central'', reason).';
COMMENT ON COLUMN softmobile.sync_conflicts.operation IS 'What the branch did: insert, update, delete.';
COMMENT ON COLUMN softmobile.sync_conflicts.field IS '(row) where one side has deleted the row: then the values are whole rows, or (deleted).';
COMMENT ON COLUMN softmobile.sync_conflicts.old_value IS 'What the branch found and changed; NULL when it inserted the row.';
COMMENT ON COLUMN softmobile.sync_conflicts.local_value IS 'What the branch made of it by this event; later changes may wait behind it.';
COMMENT ON COLUMN softmobile.sync_conflicts.central_value IS 'What central holds.';
COMMENT ON COLUMN softmobile.sync_conflicts.reason IS 'The reason of the branch''s change.';
COMMENT ON COLUMN softmobile.sync_conflicts.detail IS 'What central said of it.';

CREATE TYPE softmobile.conflict_resolution AS (
	id uuid,
	branch_id text,
	entity_type text,
	entity_id text,
	resolution text,
	reason text,
	table_name text,
	change text,
	columns text[],
	adoption uuid,
	waiting bigint,
	what_follows text
);
COMMENT ON TYPE softmobile.conflict_resolution IS 'What resolve_conflict() has done and what will happen. change: none, insert, update or delete of the row in table_name; columns: those that were changed; adoption: the event of that change; waiting: later events of the entity known to wait; what_follows: the same in words.';

CREATE FUNCTION softmobile.conflict_to_resolve(id uuid, resolution text, reason text,
	OUT why text, OUT branch text, OUT entity_no integer, OUT entity_id text, OUT priority text, OUT op "char", OUT central_row jsonb,
	OUT relation regclass, OUT key_columns name[], OUT branch_columns name[], OUT key jsonb)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	x softmobile.outbox_exception;
	before softmobile.audit;
	image json;
	tables regclass[];
	captured_id text;
	by_hand CONSTANT text := 'Resolve it as ''local'', and correct the row by hand, with a reason, if it should be as central has it.';
BEGIN
	IF resolution IS NULL OR resolution NOT IN ('local', 'central') THEN
		RAISE EXCEPTION 'unknown resolution "%"', resolution
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use ''local'' for the branch''s version, ''central'' for that of headquarters.';
	END IF;
	why := softmobile.required_reason(reason);

	-- Two callers at once: the second sees what the first has asked for.
	PERFORM pg_advisory_xact_lock(softmobile.branch_lock_class(), hashtext('conflict ' || id));
	SELECT * INTO x FROM softmobile.outbox_exception o WHERE o.id = id;
	IF NOT FOUND AND NOT EXISTS (SELECT FROM softmobile.outbox_event e WHERE e.id = id) THEN
		RAISE EXCEPTION 'there is no event %', coalesce(id::text, 'NULL')
			USING ERRCODE = 'no_data_found', HINT = 'Take the id from softmobile.sync_conflicts.';
	ELSIF x.kind = 'conflict' AND x.state <> 'failed'
		OR EXISTS (SELECT FROM softmobile.outbox_request q WHERE q.kind = 'resolve' AND id = ANY (q.ids)) THEN
		SELECT * INTO before FROM softmobile.audit a WHERE a.action = 'resolve_conflict' AND a.ids = ARRAY[id] ORDER BY a.id DESC LIMIT 1;
		RAISE EXCEPTION 'the conflict of event % is resolved already', id
			USING ERRCODE = 'object_not_in_prerequisite_state',
				DETAIL = coalesce(format('As %s, by %s at %s: %s', before.details ->> 'resolution', before.current_user_name, before.at, before.reason), 'Nothing is known of who did it.'),
				HINT = 'If the row should be otherwise, change it, with a reason.';
	ELSIF x.kind IS DISTINCT FROM 'conflict' THEN
		RAISE EXCEPTION 'event % is not in conflict', id
			USING ERRCODE = 'object_not_in_prerequisite_state',
				DETAIL = CASE WHEN x.kind = 'waiting' AND x.state = 'failed' THEN format('It waits for event %s.', x.waits_for)
					WHEN x.state = 'failed' THEN format('Central refused it: %s', x.error_message)
					WHEN x.state = 'queued' THEN 'It is about to be sent.'
					WHEN x.id IS NOT NULL THEN 'It has been sent.' ELSE 'Central has not answered it with a conflict.' END,
				HINT = CASE WHEN x.kind = 'waiting' AND x.state = 'failed' THEN 'See that one in softmobile.sync_outbox, and settle it.'
					WHEN x.state = 'failed' THEN 'Use softmobile.sync_outbox_retry().' ELSE 'SELECT id FROM softmobile.sync_conflicts lists the conflicts.' END;
	END IF;
	branch := x.branch_id;
	entity_no := x.entity_no;
	entity_id := x.entity_id;
	op := x.op;
	SELECT t.priority INTO priority FROM softmobile.outbox_entity t WHERE t.entity_no = x.entity_no;
	IF resolution = 'local' THEN
		RETURN;
	END IF;

	central_row := nullif(x.central_row, 'null');
	IF x.central_row IS NULL OR jsonb_typeof(central_row) <> 'object' THEN
		RAISE EXCEPTION 'central has not said which row it holds'
			USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('The answer to event %s had no row in "current".', id), HINT = by_hand;
	END IF;
	image := x.payload -> CASE x.op WHEN 'd' THEN 'old' ELSE 'new' END;
	-- Where an entity type has several tables, the one with all columns of the event's row, itself or in a child.
	tables := ARRAY(SELECT c.relation FROM softmobile.captured_table c WHERE c.entity_no = x.entity_no);
	IF cardinality(tables) > 1 THEN
		tables := ARRAY(SELECT t FROM unnest(tables) AS t WHERE EXISTS (SELECT FROM softmobile.tree_of(t) AS tree
			WHERE NOT EXISTS (SELECT FROM json_object_keys(image) AS k
				WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = tree AND a.attname = k AND a.attnum > 0))));
	END IF;
	IF cardinality(tables) <> 1 THEN
		RAISE EXCEPTION 'no table is attached for the row of event %', id
			USING ERRCODE = 'object_not_in_prerequisite_state',
				DETAIL = CASE cardinality(tables) WHEN 0 THEN 'Its table was detached, dropped or altered since.' ELSE 'Several tables of its entity type have such rows: ' || array_to_string(tables, ', ') || '.' END,
				HINT = CASE cardinality(tables) WHEN 0 THEN 'Attach the table again, as the same entity type, or resolve the conflict as ''local''.' ELSE by_hand END;
	END IF;
	relation := tables[1];
	SELECT c.key_columns, c.branch_columns INTO key_columns, branch_columns FROM softmobile.captured_table c WHERE c.relation = relation;
	-- The trigger wrote the entity's id from the same values.
	SELECT CASE count(*) WHEN 1 THEN min(image ->> k::text) ELSE '[' || string_agg((image -> k::text)::text, ',' ORDER BY n) || ']' END INTO captured_id
	FROM unnest(key_columns) WITH ORDINALITY AS c (k, n);
	IF captured_id IS DISTINCT FROM x.entity_id THEN
		RAISE EXCEPTION 'the key of % is another one than when event % was captured', relation, id
			USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('It is now: %s.', array_to_string(key_columns, ', ')), HINT = by_hand;
	END IF;
	SELECT jsonb_object_agg(k, image -> k::text) INTO key FROM unnest(key_columns) AS k;
END
$$;
COMMENT ON FUNCTION softmobile.conflict_to_resolve(uuid, text, text) IS
'Internal, for resolve_conflict(): checks its arguments, and says what is to be changed where. Holds an advisory lock on the conflict until the end of the transaction.';

CREATE FUNCTION softmobile.values_for(relation regclass, held jsonb, OUT "values" jsonb, OUT columns text[])
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT coalesce(jsonb_object_agg(v.key, v.value), '{}'), coalesce(array_agg(v.key ORDER BY a.attnum), '{}')
	FROM jsonb_each(held) AS v JOIN pg_attribute a ON a.attrelid = relation AND a.attname = v.key
	WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '';
END;
COMMENT ON FUNCTION softmobile.values_for(regclass, jsonb) IS 'Internal, for resolve_conflict(): the values of a row that a table has columns for, other than generated ones.';

CREATE FUNCTION softmobile.record_resolution(id uuid, resolution text, why text, relation regclass, change text, columns text[], adoption uuid)
RETURNS softmobile.conflict_resolution
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	r softmobile.conflict_resolution;
	x softmobile.outbox_exception;
BEGIN
	SELECT * INTO STRICT x FROM softmobile.outbox_exception o WHERE o.id = id;
	r.id := id;
	r.branch_id := x.branch_id;
	SELECT t.entity_type INTO r.entity_type FROM softmobile.outbox_entity t WHERE t.entity_no = x.entity_no;
	r.entity_id := x.entity_id;
	r.resolution := resolution;
	r.reason := why;
	r.table_name := relation::text;
	r.change := coalesce(change, 'none');
	r.columns := columns;
	r.adoption := adoption;
	SELECT count(*) INTO r.waiting FROM softmobile.outbox_exception w
	WHERE w.branch_id = x.branch_id AND w.entity_no = x.entity_no AND w.entity_id = x.entity_id AND w.kind = 'waiting' AND w.state = 'failed';
	r.what_follows := CASE WHEN resolution = 'local' THEN 'After commit, the event is sent again as the version that stands. Later changes of the row follow it.'
		ELSE 'After commit, the event and the later changes of the row are sent as overruled; then this change, by which branch and central hold the same.' END;

	INSERT INTO softmobile.outbox_request (kind, branch_id, ids, resolution, adoption, reason) VALUES ('resolve', x.branch_id, ARRAY[id], resolution, adoption, why);
	PERFORM softmobile.record_audit('resolve_conflict', x.branch_id, why, 1, ARRAY[id],
		jsonb_strip_nulls(jsonb_build_object('resolution', resolution, 'entity_type', r.entity_type, 'entity_id', x.entity_id, 'folio', x.folio, 'detail', x.error_message,
			'central', x.central_row, 'local', x.payload -> 'new', 'table', r.table_name, 'change', change, 'columns', columns, 'adoption', adoption)), softmobile.calling_role());
	PERFORM softmobile.poke();
	RETURN r;
END
$$;
COMMENT ON FUNCTION softmobile.record_resolution(uuid, text, text, regclass, text, text[], uuid) IS
'Internal, for resolve_conflict(): leaves the request for the worker and the audit row, and says what will happen.';

CREATE FUNCTION softmobile.resolve_conflict(id uuid, resolution text, reason text) RETURNS softmobile.conflict_resolution
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'softmobile_resolve_conflict';
COMMENT ON FUNCTION softmobile.resolve_conflict(uuid, text, text) IS
'Decides a conflict of sync_conflicts. local: the branch''s version goes to central; central: central''s row is brought into the branch''s table, at once and with the caller''s rights on it (SELECT, UPDATE, and INSERT or DELETE where the row is deleted on one side), captured with this reason. reason: at least 5 characters; NULL: the one in force. Takes effect at central after commit, and returns what will happen. If headquarters changes the row again meanwhile, there is a new conflict. Errors: 22023 resolution, 23514 no reason, P0002 unknown id; 55000 not in conflict, resolved already, and for central: the row is gone at the branch, its table is not attached any more or has another key, the change was not captured.';
