/*
 * The checklist: is this branch ready for a cut, and is it well during and after it?
 *
 * Each check is a function of (branch, days) and returns one row for each of its
 * items.  offline_checklist() runs them one by one: what a check cannot look at is
 * not ok, and keeps no other from being looked at.  ok is therefore never NULL.
 */

CREATE FUNCTION softmobile.disk_space(tablespace oid, OUT free_bytes bigint, OUT total_bytes bigint)
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'softmobile_disk_space';
COMMENT ON FUNCTION softmobile.disk_space(oid) IS
'Internal: room on the file system of this database''s files in a tablespace (0: the database''s own), or of the WAL (NULL). free_bytes: what the server may use. Errors: those of the file system.';

CREATE TYPE softmobile.check_result AS (item text, ok boolean, detail text, hint text, code text, line integer);
COMMENT ON TYPE softmobile.check_result IS 'A row of offline_checklist().';

CREATE FUNCTION softmobile.check_row(item text, ok boolean, detail text, hint text, code text, line integer) RETURNS softmobile.check_result
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
RETURN ROW(item, coalesce(ok, false), detail, CASE WHEN ok THEN NULL ELSE hint END, code, line)::softmobile.check_result;
COMMENT ON FUNCTION softmobile.check_row(text, boolean, text, text, text, integer) IS 'Internal: a row of the checklist. What is not known to be ok is not; what is needs no hint.';

/* The queue: lines 1, 4 and 5 of the procedure's checklist. */

CREATE FUNCTION softmobile.check_queue(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	waiting bigint;
	failed bigint;
	conflicts bigint;
	oldest timestamptz;
	overdue bigint;
	given_up bigint;
	first_overdue text;
	latest softmobile.sync_session;
	succeeded softmobile.sync_session;
	unsuccessful softmobile.sync_session;
	sync_interval interval := current_setting('softmobile.sync_interval')::interval;
	retry_interval interval := current_setting('softmobile.retry_interval')::interval;
	since timestamptz;
	unqueued text := softmobile.rows_unqueued();
BEGIN
	SELECT coalesce(sum(s.pending), 0), coalesce(sum(s.failed), 0), coalesce(sum(s.conflicts), 0)
	INTO waiting, failed, conflicts
	FROM softmobile.sync_outbox_stats s WHERE s.branch_id = branch;
	SELECT min(o.created_at) INTO oldest FROM softmobile.sync_outbox o WHERE o.branch_id = branch AND o.status IN ('PENDING', 'FAILED');
	SELECT * INTO latest FROM softmobile.sync_session s WHERE s.branch_id = branch ORDER BY s.id DESC LIMIT 1;
	SELECT * INTO succeeded FROM softmobile.sync_session s WHERE s.branch_id = branch AND s.status = 'success' ORDER BY s.id DESC LIMIT 1;
	SELECT * INTO unsuccessful FROM softmobile.sync_session s WHERE s.branch_id = branch AND s.status = 'failed' ORDER BY s.id DESC LIMIT 1;

	RETURN NEXT softmobile.check_row('Previous synchronisation completed and queue clean', latest.status = 'success' AND waiting + failed = 0 AND unqueued IS NULL,
		CASE WHEN latest.id IS NULL THEN 'This branch was never synchronised;'
			WHEN latest.status = 'success' THEN format('The last session succeeded, %s ago;', softmobile.in_words(clock_timestamp() - latest.finished_at))
			WHEN latest.status = 'running' THEN format('A session is running since %s;', date_trunc('second', latest.started_at))
			ELSE format('The last session failed: %s;', coalesce(latest.error_message, 'no reason given')) END
		|| format(' events waiting: %s, failed: %s.', waiting, failed) || coalesce(' ' || unqueued, ''),
		format('SELECT * FROM softmobile.sync_run(%L);', branch),
		'previous_sync', 1);

	RETURN NEXT softmobile.check_row('No conflicts', conflicts = 0,
		CASE WHEN conflicts = 0 THEN 'No event is in conflict with what central holds.' ELSE format('Events in conflict with what central holds: %s.', conflicts) END,
		'softmobile.sync_conflicts shows them, softmobile.resolve_conflict() decides.', 'conflicts', 1);

	RETURN NEXT softmobile.check_row('No failed events', failed = 0,
		CASE WHEN failed = 0 THEN 'No event has failed.' ELSE format('Failed events: %s.', failed) END,
		format('SELECT * FROM softmobile.sync_outbox WHERE branch_id = %L AND status = ''FAILED''; error_message says why.', branch), 'failed', NULL);

	RETURN NEXT softmobile.check_row('Nothing waits for long', oldest IS NULL OR oldest > clock_timestamp() - sync_interval,
		CASE WHEN oldest IS NULL THEN 'Nothing waits.' ELSE format('The oldest event that central does not have is %s old.', softmobile.in_words(clock_timestamp() - oldest)) END,
		'See whether the worker runs and the link is up, below.', 'oldest_unsent', NULL);

	-- What failed longer ago than the retry interval should have been tried again.
	SELECT coalesce(sum(x.events), 0), coalesce(sum(x.events) FILTER (WHERE x.given_up), 0), min(x.error_message)
	INTO overdue, given_up, first_overdue
	FROM (
		SELECT (SELECT sum(upper(r.seqs) - lower(r.seqs)) FROM unnest(l.failed) AS r (seqs)) AS events, false AS given_up, l.error_message
		FROM softmobile.outbox_lane_state l
		WHERE l.branch_id = branch AND l.status = 'failed' AND l.last_attempt_at < clock_timestamp() - retry_interval
		UNION ALL
		SELECT 1, e.attempt_count >= current_setting('softmobile.max_attempts')::integer, e.error_message
		FROM softmobile.outbox_exception e
		WHERE e.branch_id = branch AND e.state = 'failed' AND e.kind = 'rejected'
			AND (e.last_attempt_at < clock_timestamp() - retry_interval OR e.attempt_count >= current_setting('softmobile.max_attempts')::integer)) AS x;
	RETURN NEXT softmobile.check_row('Automatic retries confirmed (attempt_count = 0, PENDING)', overdue = 0,
		CASE WHEN overdue = 0 THEN format('No event failed longer ago than the retry interval, %s.', softmobile.in_words(retry_interval))
			ELSE format('Events that are FAILED for longer than the retry interval: %s%s: %s.', overdue,
				CASE WHEN given_up > 0 THEN format(', %s of them for good, after softmobile.max_attempts', given_up) ELSE '' END, coalesce(first_overdue, 'no reason given')) END,
		CASE WHEN given_up > 0 THEN 'Correct what central objects to, then softmobile.sync_outbox_retry(ids, reason).'
			ELSE format('They go by themselves when the link is back; SELECT softmobile.requeue_failed_outbox_entries(%L); does it at once.', branch) END,
		'retries', 4);

	-- After a cut: what had been captured before the first session that succeeded again has arrived.
	SELECT s.started_at INTO since FROM softmobile.sync_session s
	WHERE s.branch_id = branch AND s.status = 'success' AND s.id > unsuccessful.id ORDER BY s.id LIMIT 1;
	RETURN NEXT softmobile.check_row('Synchronisation afterwards run', unsuccessful.id IS NULL OR (since IS NOT NULL AND (oldest IS NULL OR oldest > since)),
		CASE WHEN unsuccessful.id IS NULL THEN 'No session has failed.'
			WHEN since IS NULL THEN format('No session has succeeded since one failed %s ago: %s.',
				softmobile.in_words(clock_timestamp() - coalesce(unsuccessful.finished_at, unsuccessful.started_at)), coalesce(unsuccessful.error_message, 'no reason given'))
			WHEN oldest <= since THEN format('Since %s sessions succeed again, but events older than that still wait.', date_trunc('second', since))
			ELSE format('All that was captured before %s, when sessions succeeded again, has arrived.', date_trunc('second', since)) END,
		format('SELECT * FROM softmobile.sync_run(%L);', branch),
		'sync_after', 5);
END
$$;
COMMENT ON FUNCTION softmobile.check_queue(text, integer) IS 'Internal: items previous_sync, conflicts, failed, oldest_unsent, retries and sync_after of the checklist.';

CREATE FUNCTION softmobile.check_discrepancies(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	open bigint := (SELECT count(*) FROM softmobile.sync_discrepancy d WHERE d.branch_id = branch AND d.status = 'open');
BEGIN
	RETURN NEXT softmobile.check_row('Discrepancies resolved', open = 0,
		CASE WHEN open = 0 THEN 'No discrepancy is open.' ELSE format('Open discrepancies: %s.', open) END,
		format('SELECT * FROM softmobile.sync_discrepancy WHERE branch_id = %L AND status = ''open''; softmobile.resolve_discrepancy() closes one, with a reason.', branch),
		'discrepancies', 5);
END
$$;
COMMENT ON FUNCTION softmobile.check_discrepancies(text, integer) IS 'Internal: item discrepancies of the checklist.';

/* What is captured: lines 2 and 3. */

CREATE FUNCTION softmobile.check_flags(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	word text;
	elsewhere text;
	off boolean;
	lost text;
BEGIN
	FOREACH word IN ARRAY '{hybrid_prep, purchases_sales, transfers}'::text[] LOOP
		off := NOT current_setting('softmobile.enable_' || word)::boolean;
		-- A role or database that has it off; who is on now need not be among them.
		SELECT string_agg(DISTINCT concat_ws(' ', 'role ' || r.rolname, 'database ' || d.datname), ', ') INTO elsewhere
		FROM pg_db_role_setting s
			CROSS JOIN unnest(s.setconfig) AS c (setting)
			LEFT JOIN pg_roles r ON r.oid = s.setrole
			LEFT JOIN pg_database d ON d.oid = s.setdatabase
		WHERE (d.datname IS NULL OR d.datname = current_database())
			AND CASE WHEN lower(c.setting) LIKE 'softmobile.enable\_' || word || '=%' THEN NOT split_part(c.setting, '=', 2)::boolean END;
		SELECT string_agg(t.entity_type, ', ' ORDER BY t.entity_type) INTO lost
		FROM softmobile.outbox_entity t
		WHERE t.flag = word AND EXISTS (SELECT FROM softmobile.captured_table c WHERE c.entity_no = t.entity_no);
		RETURN NEXT softmobile.check_row(format('Flag softmobile.enable_%s on', word), NOT off AND elsewhere IS NULL,
			CASE WHEN off OR elsewhere IS NOT NULL THEN
				concat_ws(' ', CASE WHEN off THEN 'It is off.' END, 'It is set off for ' || elsewhere || '.',
					coalesce('Changes made there of ' || lost || ' pass, but are not captured and never sent.', 'No attached table is of its group.'))
				ELSE coalesce('Captured by it: ' || lost || '.', 'No attached table is of its group.') END,
			'A superuser switches it on, in postgresql.conf or with ALTER DATABASE. softmobile.reconcile() finds what was changed meanwhile; a row is sent when it is changed again.',
			'flag_' || word, 2);
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.check_flags(text, integer) IS 'Internal: items flag_hybrid_prep, flag_purchases_sales and flag_transfers of the checklist.';

CREATE FUNCTION softmobile.check_tables(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	attached bigint;
	types text;
	without text;
	folios bigint;
BEGIN
	SELECT count(*), string_agg(DISTINCT t.entity_type, ', ' ORDER BY t.entity_type) INTO attached, types
	FROM softmobile.captured_table c JOIN softmobile.outbox_entity t USING (entity_no);
	RETURN NEXT softmobile.check_row('Tables attached', attached > 0,
		CASE WHEN attached > 0 THEN format('Captured tables: %s, of %s.', attached, types) ELSE 'No table is captured: nothing will be sent.' END,
		'Call softmobile.attach_softmobile(), or softmobile.attach() for each table.', 'attached', NULL);

	SELECT string_agg(c.relation::text, ', ' ORDER BY c.relation::text) INTO without
	FROM softmobile.captured_table c WHERE NOT c.require_reason;
	RETURN NEXT softmobile.check_row('Operations recorded with X-Reason', attached > 0 AND without IS NULL,
		CASE WHEN attached = 0 THEN 'No table is captured.'
			WHEN without IS NULL THEN 'Every captured table refuses a change without a reason.'
			ELSE format('A change without a reason is accepted by %s.', without) END,
		'Attach it again with require_reason => true.', 'reasons', 3);

	SELECT count(*) FILTER (WHERE c.folio_column IS NOT NULL AND c.amount_column IS NOT NULL),
		string_agg(c.relation::text, ', ' ORDER BY c.relation::text)
			FILTER (WHERE t.entity_type = 'sale' AND (c.folio_column IS NULL OR c.amount_column IS NULL))
	INTO folios, without
	FROM softmobile.captured_table c JOIN softmobile.outbox_entity t USING (entity_no);
	RETURN NEXT softmobile.check_row('Local receipts kept by folio', folios > 0 AND without IS NULL,
		CASE WHEN without IS NOT NULL THEN format('The folio or the amount of %s is not known.', without)
			WHEN folios = 0 THEN 'No captured table has a folio and an amount.'
			ELSE format('Captured tables with folio and amount: %s. softmobile.folio_control counts their receipts.', folios) END,
		'Attach the table of sales again, with folio_column and amount_column.', 'folios', 3);
END
$$;
COMMENT ON FUNCTION softmobile.check_tables(text, integer) IS 'Internal: items attached, reasons and folios of the checklist.';

CREATE FUNCTION softmobile.check_triggers(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	faults text;
	replica text;
BEGIN
	SELECT string_agg(x.fault, ', ' ORDER BY x.fault) INTO faults FROM (
		SELECT CASE WHEN g.oid IS NULL THEN format('%s has no trigger %s', m.relid, m.called) ELSE format('trigger %I of %s does not fire', g.tgname, m.relid) END AS fault
		FROM (
			SELECT tree.relid, f.called, f.called::regprocedure AS function, '{O, A}'::"char"[] AS good
			FROM softmobile.captured_table c
				CROSS JOIN softmobile.tree_of(c.relation) AS tree (relid)
				JOIN pg_class k ON k.oid = tree.relid AND k.relkind IN ('r', 'p')
				CROSS JOIN unnest('{softmobile.capture(), softmobile.refuse_truncate()}'::text[]) AS f (called)) AS m
			LEFT JOIN pg_trigger g ON g.tgrelid = m.relid AND g.tgfoid = m.function
		WHERE (g.tgenabled = ANY (m.good)) IS NOT TRUE
		UNION ALL
		SELECT format('%s has %s triggers %s', g.tgrelid::regclass, count(*), g.tgfoid::regprocedure)
		FROM pg_trigger g
		WHERE g.tgfoid = 'softmobile.capture()'::regprocedure GROUP BY g.tgrelid, g.tgfoid HAVING count(*) > 1
		UNION ALL
		-- What keeps the log as it is fires for everyone, in replica mode too.
		SELECT CASE WHEN g.oid IS NULL THEN format('%s has no trigger %s', m.relid, m.called) ELSE format('trigger %I of %s does not always fire', g.tgname, m.relid) END
		FROM (
			SELECT tree.relid, f.called FROM softmobile.tree_of('softmobile.outbox_event') AS tree (relid)
				CROSS JOIN unnest('{refuse_row_change, refuse_truncate}'::name[]) AS f (called)) AS m
			LEFT JOIN pg_trigger g ON g.tgrelid = m.relid AND g.tgname = m.called
		WHERE g.tgenabled IS DISTINCT FROM 'A'
		UNION ALL
		SELECT format('event trigger %s does not always fire', m.called)
		FROM unnest('{softmobile_note_columns, softmobile_follow_ddl, softmobile_follow_drop}'::name[]) AS m (called)
			LEFT JOIN pg_event_trigger g ON g.evtname = m.called
		WHERE g.evtenabled IS DISTINCT FROM 'A') AS x;
	RETURN NEXT softmobile.check_row('Capture is complete', faults IS NULL,
		CASE WHEN faults IS NULL THEN 'All triggers of attached tables and of the log fire.' ELSE format('Found: %s.', faults) END,
		'ALTER TABLE ... ENABLE TRIGGER, for the log ENABLE ALWAYS TRIGGER; a missing one comes back with softmobile.detach() and softmobile.attach(). Reconcile what was changed meanwhile.',
		'triggers', NULL);

	SELECT string_agg(x.place, ', ') INTO replica FROM (
		SELECT 'this session' AS place WHERE current_setting('session_replication_role') = 'replica'
		UNION ALL
		SELECT concat_ws(' ', 'role ' || r.rolname, 'database ' || d.datname)
		FROM pg_db_role_setting s
			CROSS JOIN unnest(s.setconfig) AS c (setting)
			LEFT JOIN pg_roles r ON r.oid = s.setrole
			LEFT JOIN pg_database d ON d.oid = s.setdatabase
		WHERE (d.datname IS NULL OR d.datname = current_database()) AND lower(c.setting) = 'session_replication_role=replica') AS x;
	RETURN NEXT softmobile.check_row('No session in replica mode', replica IS NULL,
		CASE WHEN replica IS NULL THEN 'session_replication_role is not replica here, nor for any role or database.' ELSE format('session_replication_role is replica for %s: changes made there are not captured.', replica) END,
		'Set it to origin. Reconcile what was changed meanwhile.', 'replica_mode', NULL);
END
$$;
COMMENT ON FUNCTION softmobile.check_triggers(text, integer) IS 'Internal: items triggers and replica_mode of the checklist.';

/* Step 3 of the preparation: reference data and printers. */

CREATE FUNCTION softmobile.check_preparation(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	fresh constant interval := interval '1 day';
	call text := format('SELECT * FROM softmobile.prepare_offline(%L);', branch);
	latest softmobile.offline_preparation;
	failures text;
	documents text;
	stale bigint;
	n bigint;
BEGIN
	SELECT * INTO latest FROM softmobile.offline_preparation p WHERE p.branch_id = branch ORDER BY p.id DESC LIMIT 1;
	SELECT string_agg(s.step, ', ') INTO failures FROM json_to_recordset(latest.steps) AS s (step text, ok boolean) WHERE NOT s.ok;
	RETURN NEXT softmobile.check_row('Preparation done', latest.ok AND latest.finished_at > clock_timestamp() - fresh,
		CASE WHEN latest.id IS NULL THEN 'prepare_offline() was never called for this branch.'
			ELSE format('prepare_offline() was called %s ago by %s; %s.', softmobile.in_words(clock_timestamp() - latest.finished_at), latest.prepared_by,
				coalesce('not in order: ' || failures, 'all was in order')) END,
		call, 'prepared', 1);

	SELECT count(*), count(*) FILTER (WHERE r.checked_at <= clock_timestamp() - fresh),
		string_agg(format('%s %s', r.name, softmobile.in_words(clock_timestamp() - r.checked_at)), ', ' ORDER BY r.name)
	INTO n, stale, documents
	FROM softmobile.reference_data r WHERE r.branch_id = branch;
	-- A central that offers none has been asked.
	IF n = 0 AND latest.finished_at > clock_timestamp() - fresh
		AND EXISTS (SELECT FROM json_to_recordset(latest.steps) AS s (step text, ok boolean) WHERE s.step = 'reference' AND s.ok) THEN
		n := NULL;
	END IF;
	RETURN NEXT softmobile.check_row('Recent copies of catalogue, customers and POS configuration', n IS NULL OR (n > 0 AND stale = 0),
		CASE WHEN n IS NULL THEN 'Central offers no reference data, or none was asked for.' WHEN n = 0 THEN 'No reference data was pulled.' ELSE format('Age: %s.', documents) END,
		call, 'reference', NULL);

	SELECT count(*), count(*) FILTER (WHERE p.confirmed_at <= clock_timestamp() - fresh),
		string_agg(format('%s %s ago by %s', p.printer, softmobile.in_words(clock_timestamp() - p.confirmed_at), p.confirmed_by), ', ' ORDER BY p.printer)
	INTO n, stale, documents
	FROM softmobile.printer_confirmation p WHERE p.branch_id = branch;
	RETURN NEXT softmobile.check_row('Local printers confirmed', n > 0 AND stale = 0,
		CASE WHEN n = 0 THEN 'No printer was confirmed.' ELSE format('Confirmed: %s.', documents) END,
		format('Print a page, then SELECT softmobile.confirm_printer(%L, ''caja 1''); softmobile.forget_printer() for one that is gone.', branch),
		'printers', NULL);
END
$$;
COMMENT ON FUNCTION softmobile.check_preparation(text, integer) IS 'Internal: items prepared, reference and printers of the checklist; each is good for a day.';

/* Central and the way there. */

CREATE FUNCTION softmobile.is_local_url(url text) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
RETURN url ~* '^https?://(localhost|127\.[0-9.]+|\[::1\])([:/]|$)';
COMMENT ON FUNCTION softmobile.is_local_url(text) IS 'Internal: whether a URL names this very machine, so that nobody can listen in.';

CREATE FUNCTION softmobile.check_central(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	url text := coalesce((SELECT b.central_url FROM softmobile.branch b WHERE b.branch_id = branch), softmobile.database_setting('softmobile.central_url'));
	unknown constant text := 'Not known: central did not answer.';
	once_up constant text := 'See the link, above.';
	health record;
	list record;
	up boolean;
	page boolean;
	ours boolean;
	left_days numeric;
	ahead interval;
	encrypted boolean := coalesce(url ~* '^https:', false);
	accepted timestamptz;
BEGIN
	SELECT * INTO health FROM softmobile.ask_central(branch, 'GET', '/health', NULL, 65536);
	-- A captive portal answers 200 to everything, with a web page.
	page := health.outcome = 'answered' AND health.status BETWEEN 200 AND 299 AND coalesce(health.content_type ~* '^\s*(text/html|application/xhtml)', false);
	up := health.outcome = 'answered' AND health.status BETWEEN 200 AND 299 AND NOT page;
	ahead := health.server_time - (clock_timestamp() - health.round_trip / 2);
	RETURN NEXT softmobile.check_row('Link to central up', up,
		CASE WHEN up THEN format('Central answered within %s ms.', round(extract(epoch FROM health.round_trip) * 1000))
			WHEN page THEN 'What answered is a web page, not central.'
			WHEN health.outcome = 'answered' THEN format('Central answered %s.', health.status)
			ELSE format('%s: %s.', health.outcome, coalesce(health.error, 'no reason given')) END,
		CASE
			WHEN health.outcome = 'configuration' THEN 'Correct softmobile.central_url and softmobile.auth_token_file.'
			WHEN health.outcome = 'tls' THEN 'See the certificate, below.'
			WHEN health.outcome = 'offline' THEN 'Sell on: events are kept. Look after cable, router and line; then whether softmobile.central_url is right.'
			ELSE 'Check that softmobile.central_url is the central server, and not a portal in between.' END,
		'link', NULL);

	IF up THEN
		SELECT * INTO list FROM softmobile.ask_central(branch, 'GET', '/reference?branch=' || softmobile.percent_encode(branch), NULL, 1048576);
		IF list.outcome = 'answered' AND list.status IN (404, 405) THEN
			SELECT max(b.settled_at) INTO accepted FROM softmobile.outbox_batch b JOIN softmobile.outbox_lane l USING (lane_id)
			WHERE l.branch_id = branch AND b.kind = 'sent' AND b.settled_at > clock_timestamp() - interval '1 day';
		END IF;
		BEGIN
			ours := list.status = 200 AND coalesce(jsonb_typeof(list.answer::jsonb -> 'resources') = 'array', false);
		EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
			ours := false;
		END;
		RETURN NEXT softmobile.check_row('Token valid', list.outcome = 'answered' AND (ours OR accepted IS NOT NULL),
			CASE WHEN list.outcome <> 'answered' THEN format('Not known: %s.', coalesce(list.error, list.outcome))
				WHEN ours THEN 'Central accepts it for this branch.'
				WHEN list.status = 200 THEN 'Not known: what answered is not central''s list of reference data.'
				WHEN accepted IS NOT NULL THEN format('Central accepted events %s ago.', softmobile.in_words(clock_timestamp() - accepted))
				WHEN list.status IN (404, 405) THEN 'Not known: this central cannot be asked, and has accepted no events for a day.'
				ELSE format('Central answered %s.', list.status) END,
			CASE
				WHEN list.status IN (401, 403) THEN 'Ask headquarters for a token of this branch, and put it into the file of softmobile.auth_token_file.'
				ELSE format('SELECT * FROM softmobile.sync_run(%L); shows whether central accepts events.', branch) END,
			'token', NULL);
	ELSE
		RETURN NEXT softmobile.check_row('Token valid', false, unknown, once_up, 'token', NULL);
	END IF;

	left_days := floor(extract(epoch FROM health.certificate_until - clock_timestamp()) / 86400);
	RETURN NEXT softmobile.check_row('TLS certificate of central valid for the whole cut',
		CASE WHEN encrypted THEN health.outcome = 'answered' AND left_days >= days ELSE softmobile.is_local_url(url) END,
		CASE
			WHEN NOT encrypted AND softmobile.is_local_url(url) THEN 'None is needed: central is on this machine.'
			WHEN NOT encrypted THEN 'The link is not encrypted.'
			WHEN health.outcome = 'tls' THEN format('It does not verify: %s.', coalesce(health.error, 'no reason given'))
			WHEN left_days IS NOT NULL THEN format('Days left: %s.', left_days)
			WHEN health.outcome = 'answered' THEN 'Not known: this build of libcurl does not tell.'
			ELSE unknown END,
		CASE
			WHEN NOT encrypted THEN 'Use an https:// URL as softmobile.central_url.'
			WHEN health.outcome = 'tls' THEN 'Check softmobile.ca_file, the clock, and with headquarters the certificate of the central server.'
			WHEN left_days IS NOT NULL THEN 'Ask headquarters to renew it; else the link may not come back after the cut.'
			ELSE once_up END,
		'certificate', NULL);

	RETURN NEXT softmobile.check_row('Clock right', ahead BETWEEN interval '-1 minute' AND interval '1 minute',
		CASE WHEN ahead IS NULL THEN CASE WHEN health.outcome = 'answered' THEN 'Not known: central does not tell the time.' ELSE unknown END
			WHEN ahead BETWEEN interval '-2 seconds' AND interval '2 seconds' THEN 'It agrees with central''s.'
			WHEN ahead > interval '0' THEN format('It is %s behind central''s.', softmobile.in_words(ahead))
			ELSE format('It is %s ahead of central''s.', softmobile.in_words(-ahead)) END,
		CASE WHEN ahead IS NULL THEN once_up
			ELSE 'Have the system keep its time by NTP. The order of events does not depend on it, but their dates do.' END,
		'clock', NULL);
END
$$;
COMMENT ON FUNCTION softmobile.check_central(text, integer) IS 'Internal: items link, token, certificate and clock of the checklist. Asks central: GET /health and GET /reference.';

/* This server. */

CREATE FUNCTION softmobile.check_worker(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	w record;
	long interval := current_setting('softmobile.sync_interval')::interval;
	held text;
	preloaded boolean := EXISTS (SELECT FROM unnest(string_to_array(current_setting('shared_preload_libraries'), ',')) AS l (library)
		WHERE btrim(l.library, ' "') ~ '(^|/)softmobile(\.so)?$');
BEGIN
	SELECT * INTO w FROM softmobile.worker_status();
	RETURN NEXT softmobile.check_row('Library preloaded', preloaded,
		CASE WHEN preloaded THEN 'softmobile is in shared_preload_libraries.' ELSE 'softmobile is not in shared_preload_libraries: no worker can run.' END,
		'ALTER SYSTEM SET shared_preload_libraries = ''softmobile''; and restart the server.', 'preload', NULL);
	RETURN NEXT softmobile.check_row('Worker running', w.running,
		CASE WHEN w.running THEN format('Since %s%s.', date_trunc('second', w.started_at),
				(SELECT format(', as %s%s', r.rolname, CASE WHEN r.rolsuper THEN ', a superuser: softmobile.worker_role can name a role that may do less' END)
					FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid WHERE a.pid = w.pid))
			ELSE coalesce(w.detail, 'It is not running.') END,
		'Events are kept meanwhile. If it does not come by itself, the server log says why.', 'worker', NULL);

	SELECT string_agg(format('%s since %s', x.who, date_trunc('second', x.since)), ', ' ORDER BY x.since) INTO held
	FROM (
		SELECT format('prepared transaction %L', p.gid) AS who, p.prepared AS since FROM pg_prepared_xacts p WHERE p.database = current_database()
		UNION ALL
		SELECT format('process %s', a.pid), a.xact_start FROM pg_stat_activity a
		WHERE a.datname = current_database() AND a.backend_type = 'client backend' AND a.xact_start IS NOT NULL) AS x
	WHERE x.since < clock_timestamp() - long;
	RETURN NEXT softmobile.check_row('No transaction left open', held IS NULL,
		CASE WHEN held IS NULL THEN format('None is older than %s.', softmobile.in_words(long)) ELSE format('Open: %s.', held) END,
		'End it: what it has captured is not committed, and is not sent. COMMIT PREPARED or ROLLBACK PREPARED, pg_terminate_backend().', 'transactions', NULL);
END
$$;
COMMENT ON FUNCTION softmobile.check_worker(text, integer) IS 'Internal: items preload, worker and transactions of the checklist.';

CREATE FUNCTION softmobile.check_branches(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	is_active boolean := (SELECT b.active FROM softmobile.branch b WHERE b.branch_id = branch);
	unregistered text := (SELECT string_agg(b.branch_id, ', ' ORDER BY b.branch_id) FROM softmobile.branch b WHERE b.registered_by = 'first sight');
	own boolean := EXISTS (SELECT FROM softmobile.branch b WHERE b.registered_by = 'first sight' AND b.branch_id = current_database())
		AND softmobile.database_setting('softmobile.branch_id') = '';
BEGIN
	RETURN NEXT softmobile.check_row('Branch active', is_active,
		CASE WHEN is_active THEN 'Its events are sent.' ELSE 'Its events wait: it is not active.' END,
		'softmobile.register_branch(..., active => true) switches it on.', 'active', NULL);
	RETURN NEXT softmobile.check_row('All branches registered by hand', unregistered IS NULL,
		CASE WHEN unregistered IS NULL THEN 'Nobody sells for a branch that is not known.' ELSE format('First seen in a row, and not registered since: %s.', unregistered) END,
		CASE WHEN own THEN format('Rows of tables without a branch column are of branch %1$L, as the database is called: ALTER DATABASE %1$I SET softmobile.branch_id = %2$L, if that is their branch.', current_database(), branch)
			ELSE 'Register it with softmobile.register_branch() if it is one; else correct the rows that name it.' END, 'registered', NULL);
END
$$;
COMMENT ON FUNCTION softmobile.check_branches(text, integer) IS 'Internal: items active and registered of the checklist.';

CREATE FUNCTION softmobile.check_disk(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	-- What a day adds, from the segments that events went to in the last week: they are only ever appended to, so their
	-- size is what has come since their first event.  As much again for the rows that the events are about.
	segment record;
	first_event timestamptz;
	written numeric := 0;
	since timestamptz := clock_timestamp() - interval '1 day';
	a_day numeric;
	needed numeric;
	spare bigint := pg_size_bytes(current_setting('max_wal_size'));
	room bigint;
	slots text;
	archiver record;
	archiving boolean;
BEGIN
	FOR segment IN
		SELECT to_regclass('softmobile.outbox_event_' || n.segment) AS relation
		FROM generate_series(1, 4) AS n (segment) LEFT JOIN softmobile.outbox_segment o USING (segment)
		WHERE o.closed_at IS NULL OR o.closed_at > clock_timestamp() - interval '7 days'
	LOOP
		EXECUTE format('SELECT e.created_at FROM %s e LIMIT 1', segment.relation) INTO first_event;
		IF first_event IS NOT NULL THEN
			written := written + pg_total_relation_size(segment.relation);
			since := least(since, first_event);
		END IF;
	END LOOP;
	a_day := 2 * written / (extract(epoch FROM clock_timestamp() - since) / 86400);
	needed := a_day * days + spare;
	SELECT min(f.free_bytes) INTO room
	FROM (SELECT DISTINCT c.reltablespace FROM softmobile.tree_of('softmobile.outbox_event') AS t (relid) JOIN pg_class c ON c.oid = t.relid
			UNION SELECT NULL) AS s
		CROSS JOIN softmobile.disk_space(s.reltablespace) AS f;
	RETURN NEXT softmobile.check_row(format('Disk for %s days', days), room >= needed,
		format('%s free; %s days at the present rate (%s a day) need %s, with %s for WAL.',
			pg_size_pretty(room), days, pg_size_pretty(ceil(a_day)), pg_size_pretty(ceil(needed)), pg_size_pretty(spare)),
		'Free disk before the cut: nothing that waits can be removed during it.', 'disk', NULL);

	SELECT string_agg(s.slot_name, ', ' ORDER BY s.slot_name) INTO slots
	FROM pg_replication_slots s WHERE NOT s.active AND NOT s.temporary AND current_setting('max_slot_wal_keep_size') = '-1';
	SELECT a.last_archived_time, a.last_failed_time INTO archiver FROM pg_stat_archiver a;
	archiving := current_setting('archive_mode') = 'off' OR coalesce(archiver.last_archived_time > archiver.last_failed_time, archiver.last_failed_time IS NULL);
	RETURN NEXT softmobile.check_row('WAL is not piling up', slots IS NULL AND archiving,
		CASE WHEN slots IS NULL AND archiving THEN 'No replication slot and no failing archive command keeps WAL.'
			ELSE concat_ws(' ', 'Kept without limit for unused replication slots: ' || slots || '.',
				CASE WHEN NOT archiving THEN format('archive_command fails since %s.', date_trunc('second', archiver.last_failed_time)) END) END,
		CASE WHEN slots IS NOT NULL THEN 'Set max_slot_wal_keep_size, or drop the slots: else a long cut fills the disk.'
			ELSE 'Correct archive_command: else a long cut fills the disk.' END, 'wal', NULL);
END
$$;
COMMENT ON FUNCTION softmobile.check_disk(text, integer) IS 'Internal: items disk and wal of the checklist. The rate is that of the last days: of the segments of the log that took events in the last week.';

CREATE FUNCTION softmobile.check_safety(branch text, days integer) RETURNS SETOF softmobile.check_result
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	kept interval := current_setting('softmobile.retention')::interval;
	set_back interval := current_setting('softmobile.central_backup_window')::interval;
	needed interval := set_back + make_interval(days => days);
	latest softmobile.backup_record;
	unsafe text := concat_ws(' and ', CASE WHEN current_setting('fsync') = 'off' THEN 'fsync' END,
		CASE WHEN current_setting('full_page_writes') = 'off' THEN 'full_page_writes' END);
BEGIN
	SELECT * INTO latest FROM softmobile.backup_record b ORDER BY b.finished_at DESC LIMIT 1;
	RETURN NEXT softmobile.check_row('Recent backup of this database', latest.finished_at > clock_timestamp() - interval '36 hours',
		CASE WHEN latest.id IS NULL THEN 'None was recorded.'
			ELSE format('The last one (%s) was complete %s ago.', latest.kind, softmobile.in_words(clock_timestamp() - latest.finished_at)) END,
		'Make one, and have the script say so: SELECT softmobile.record_backup(''pg_dump'');', 'backup', NULL);

	RETURN NEXT softmobile.check_row('Delivered events kept for long enough', kept >= needed,
		format('Kept for %s; a restore at headquarters may need %s, after a cut of %s days.', softmobile.in_words(kept), softmobile.in_words(needed), days),
		'Raise softmobile.retention; softmobile.central_backup_window says how far back headquarters'' backups reach.', 'retention', NULL);

	RETURN NEXT softmobile.check_row('Sales survive a power cut', unsafe = '',
		CASE WHEN unsafe = '' THEN 'fsync and full_page_writes are on.' ELSE format('Off: %s. A power cut may destroy the database.', unsafe) END,
		'Set it on in postgresql.conf.', 'durability', NULL);
END
$$;
COMMENT ON FUNCTION softmobile.check_safety(text, integer) IS
'Internal: items backup, retention and durability of the checklist. PostgreSQL does not know by itself of a backup, only of archived WAL, which is none without one: so the backup script reports it.';

/* All of it. */

CREATE FUNCTION softmobile.offline_checklist(branch text, days integer DEFAULT 7)
RETURNS TABLE (item text, ok boolean, detail text, hint text, code text, line integer)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD'
AS $$
DECLARE
	checked text;
	r softmobile.check_result;
	message text;
	context text;
BEGIN
	PERFORM softmobile.named_branch(branch);
	IF days IS NULL OR days NOT BETWEEN 1 AND 3650 THEN
		RAISE EXCEPTION 'days must be between 1 and 3650'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Say how long the cut may last.';
	END IF;
	FOREACH checked IN ARRAY '{queue, flags, tables, discrepancies, preparation, central, worker, branches, triggers, disk, safety}'::text[] LOOP
		BEGIN
			FOR r IN EXECUTE format('SELECT * FROM softmobile.%I($1, $2)', 'check_' || checked) USING branch, days LOOP
				item := r.item;
				ok := r.ok;
				detail := r.detail;
				hint := r.hint;
				code := r.code;
				line := r.line;
				RETURN NEXT;
			END LOOP;
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, context = PG_EXCEPTION_CONTEXT;
			RAISE LOG 'softmobile: the check of % could not be made: %', checked, message USING DETAIL = context;
			item := 'Check of ' || checked;
			ok := false;
			detail := format('It could not be made: %s.', message);
			hint := 'The server log says where it failed.';
			code := checked;
			line := NULL;
			RETURN NEXT;
		END;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.offline_checklist(text, integer) IS
'Is a branch ready for a cut of so many days, and well during and after it? One row for each line of the procedure''s checklist (line: its number) and for each thing that goes wrong in practice: item, ok, detail (what is the case), hint (what to do where it is not ok), code (a word that stays the same). ok is never NULL: what cannot be looked at is not ok. Changes nothing; asks central over HTTP, at most for softmobile.request_timeout each. Codes: previous_sync, conflicts, failed, oldest_unsent, retries, sync_after, flag_hybrid_prep, flag_purchases_sales, flag_transfers, attached, reasons, folios, discrepancies, prepared, reference, printers, link, token, certificate, clock, preload, worker, transactions, active, registered, triggers, replica_mode, disk, wal, backup, retention, durability. Errors: 22004 branch NULL, 42704 unknown branch, 22023 days not between 1 and 3650.';
