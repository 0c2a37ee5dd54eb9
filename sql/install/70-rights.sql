/*
 * Rights.  Last part: everything that was created before is covered.
 */

CREATE FUNCTION softmobile.rights_of(kind text) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT r.what FROM (VALUES
		-- How things stand: figures, sessions, receipts, differences.
		('SELECT ON softmobile.sync_overview, softmobile.sync_outbox_stats, softmobile.sync_history', '{app, operator, auditor}'::text[]),
		('SELECT ON softmobile.folio_control, softmobile.sync_discrepancy, softmobile.reference_data_status', '{app, operator, auditor}'),
		('EXECUTE ON FUNCTION softmobile.outbox_counts(), softmobile.worker_status()', '{app, operator, auditor}'),
		('EXECUTE ON FUNCTION softmobile.folio_control_of(text, date, date), softmobile.sync_explain(text, text)', '{app, operator, auditor}'),
		('EXECUTE ON FUNCTION softmobile.verify_delivery(text, boolean), softmobile.ledger_of(integer, bigint), softmobile.numbers_of(int8multirange)', '{app, operator, auditor}'),
		-- The procedure: before a cut, retries, reconciliation.
		('SELECT ON softmobile.reference_data', '{app, operator}'),
		('EXECUTE ON FUNCTION softmobile.sync_run(text, interval), softmobile.offline_checklist(text, integer)', '{app, operator}'),
		('EXECUTE ON FUNCTION softmobile.prepare_offline(text, text[], interval), softmobile.confirm_printer(text, text)', '{app, operator}'),
		('EXECUTE ON FUNCTION softmobile.requeue_failed_outbox_entries(text, interval), softmobile.sync_outbox_retry(uuid[], text)', '{app, operator}'),
		('EXECUTE ON FUNCTION softmobile.reconcile(text, date, date), softmobile.resolve_discrepancy(bigint, text)', '{app, operator}'),
		-- The queue: without what the events say, for who sells.
		('SELECT (id, branch_id, entity_type, entity_id, operation, reason, actor, status, priority, attempt_count, last_attempt_at, '
			'error_message, conflict_flag, created_at, updated_at) ON softmobile.sync_outbox', '{app}'),
		('SELECT ON softmobile.sync_outbox, softmobile.sync_conflicts, softmobile.sync_audit', '{operator, auditor}'),
		('SELECT ON softmobile.branch, softmobile.captured_table', '{operator, auditor}'),
		('SELECT ON softmobile.offline_preparation, softmobile.printer_confirmation, softmobile.backup_record', '{operator, auditor}'),
		('EXECUTE ON FUNCTION softmobile.metrics(), softmobile.sync_outbox_page(text, text, integer, uuid)', '{operator, auditor}'),
		('EXECUTE ON FUNCTION softmobile.resolve_conflict(uuid, text, text), softmobile.resend(text, text, int8multirange, text, uuid)', '{operator}'),
		('EXECUTE ON FUNCTION softmobile.register_branch(text, text, text, boolean, text)', '{operator}'),
		('EXECUTE ON FUNCTION softmobile.forget_printer(text, text), softmobile.record_backup(text, timestamptz, text)', '{operator}'),
		('SELECT ON softmobile.outbox_batch, softmobile.outbox_exception, softmobile.outbox_epoch', '{auditor}'),
		-- The worker.
		('INSERT, UPDATE ON softmobile.outbox_batch, softmobile.outbox_exception, softmobile.sync_session, softmobile.audit', '{worker}'),
		('INSERT, UPDATE ON softmobile.outbox_identity, softmobile.link_state', '{worker}'),
		('UPDATE ON softmobile.outbox_lane', '{worker}'),
		('DELETE ON softmobile.outbox_request, softmobile.outbox_identity', '{worker}'),
		('EXECUTE ON FUNCTION softmobile.register_unknown_branches(text[]), softmobile.open_epoch(text), softmobile.close_lanes()', '{worker}'),
		('EXECUTE ON FUNCTION softmobile.snapshot_step(bigint), softmobile.recycle_segments(interval), softmobile.shrink_trash(integer)', '{worker}'),
		('EXECUTE ON FUNCTION softmobile.automatic_reason(), softmobile.tile_size(), softmobile.write_tiles(integer, bigint, bigint)', '{worker}'),
		('EXECUTE ON FUNCTION softmobile.verify_question(text, bigint), softmobile.take_verification(text, text)', '{worker}')
	) AS r (what, kinds)
	WHERE kind = ANY (r.kinds)
	UNION ALL
	-- Of the tables, not what headquarters has, its tokens least of all; of the views, not those for people.
	SELECT format(CASE c.relkind WHEN 'S' THEN 'USAGE ON SEQUENCE %s' ELSE 'SELECT ON %s' END, c.oid::regclass)
	FROM pg_class c
	WHERE kind = 'worker' AND c.relnamespace = 'softmobile'::regnamespace
		AND (c.relkind IN ('r', 'S') OR c.relname = 'outbox_lane_state') AND NOT starts_with(c.relname, 'central_');
END;
COMMENT ON FUNCTION softmobile.rights_of(text) IS 'Internal: what grant_role() grants to a kind of role.';

CREATE FUNCTION softmobile.grant_role(role name, kind text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	what text;
BEGIN
	IF role IS NULL OR NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = role) THEN
		RAISE EXCEPTION 'role "%" does not exist', role
			USING ERRCODE = 'undefined_object', HINT = coalesce('Create it first: CREATE ROLE ' || quote_ident(role) || '.', 'Name the role that is to have the rights.');
	END IF;
	IF kind IS NULL OR kind NOT IN ('app', 'operator', 'auditor', 'worker') THEN
		RAISE EXCEPTION 'unknown kind of role "%"', kind
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use operator, auditor, app or worker.';
	END IF;
	FOR what IN SELECT softmobile.rights_of(kind) LOOP
		EXECUTE format('GRANT %s TO %I', what, role);
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.grant_role(name, text) IS
'Grants a role what its kind needs. app: sells, and does what the operating procedure asks, seeing the queue without what the events say; operator: also payloads, conflicts, resend(), branches, audit; auditor: reads everything of the queue, changes nothing; worker: what softmobile.worker_role must have. Errors: 42704, 22023. Run by the owner of the extension.';

REVOKE ALL ON ALL TABLES IN SCHEMA softmobile FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA softmobile FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA softmobile FROM PUBLIC;
-- What ALTER DEFAULT PRIVILEGES of the installing superuser has given to others.
DO $$
DECLARE
	f record;
BEGIN
	PERFORM softmobile.revoke_defaults(c.oid) FROM pg_class c WHERE c.relnamespace = 'softmobile'::regnamespace AND c.relkind IN ('r', 'v', 'S');
	FOR f IN
		SELECT p.oid::regprocedure AS function, pg_get_userbyid(a.grantee) AS role
		FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) AS a
		WHERE p.pronamespace = 'softmobile'::regnamespace AND a.grantee <> p.proowner
	LOOP
		EXECUTE format('REVOKE ALL ON FUNCTION %s FROM %I', f.function, f.role);
	END LOOP;
END
$$;
GRANT EXECUTE ON FUNCTION softmobile.set_reason(text), softmobile.current_reason() TO PUBLIC;
