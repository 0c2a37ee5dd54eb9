/*
 * Rights.  Last part: everything that was created before is covered.
 */

CREATE FUNCTION softmobile.grant_role(role name, kind text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = role) THEN
		RAISE EXCEPTION 'role "%" does not exist', role
			USING ERRCODE = 'undefined_object', HINT = 'Create it first: CREATE ROLE ' || quote_ident(role) || '.';
	END IF;
	CASE kind
		WHEN 'app' THEN
			-- Sells, sets reasons, looks at the queue's figures, runs a synchronisation.
			EXECUTE format('GRANT SELECT ON softmobile.sync_overview TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.outbox_counts() TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.sync_outbox_stats, softmobile.sync_history TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.sync_run(text, interval), softmobile.worker_status() TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.reference_data, softmobile.reference_data_status TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.offline_checklist(text, integer) TO %I', role);
		WHEN 'operator' THEN
			EXECUTE format('GRANT SELECT ON softmobile.sync_overview TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.outbox_counts(), softmobile.metrics() TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.sync_conflicts TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.resolve_conflict(uuid, text, text) TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.reference_data, softmobile.reference_data_status, softmobile.offline_preparation, softmobile.printer_confirmation, softmobile.backup_record TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.offline_checklist(text, integer), softmobile.prepare_offline(text, text[], interval), softmobile.confirm_printer(text, text), softmobile.forget_printer(text, text), softmobile.record_backup(text, timestamptz, text) TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.sync_outbox, softmobile.sync_outbox_stats, softmobile.sync_history, softmobile.sync_audit, softmobile.branch, softmobile.captured_table TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.ledger_of(integer, bigint), softmobile.sync_run(text, interval), softmobile.worker_status(), softmobile.requeue_failed_outbox_entries(text, interval), softmobile.sync_outbox_retry(uuid[], text), softmobile.resend(text, text, int8multirange, text, uuid), softmobile.verify_delivery(text, boolean), softmobile.register_branch(text, text, text, boolean, text) TO %I', role);
		WHEN 'auditor' THEN
			EXECUTE format('GRANT SELECT ON softmobile.sync_overview TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.outbox_counts(), softmobile.metrics(), softmobile.worker_status() TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.sync_conflicts TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.reference_data_status, softmobile.offline_preparation, softmobile.printer_confirmation, softmobile.backup_record TO %I', role);
			EXECUTE format('GRANT SELECT ON softmobile.sync_outbox, softmobile.sync_outbox_stats, softmobile.sync_history, softmobile.sync_audit, softmobile.branch, softmobile.captured_table, softmobile.outbox_batch, softmobile.outbox_exception, softmobile.outbox_epoch TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.ledger_of(integer, bigint), softmobile.verify_delivery(text, boolean) TO %I', role);
		WHEN 'worker' THEN
			EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA softmobile TO %I', role);
			EXECUTE format('GRANT INSERT, UPDATE ON softmobile.outbox_batch, softmobile.outbox_exception, softmobile.sync_session, softmobile.audit, softmobile.outbox_identity, softmobile.link_state TO %I', role);
			EXECUTE format('GRANT UPDATE ON softmobile.outbox_lane TO %I', role);
			EXECUTE format('GRANT DELETE ON softmobile.outbox_request, softmobile.outbox_identity TO %I', role);
			EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA softmobile TO %I', role);
			EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.register_unknown_branches(text[]), softmobile.open_epoch(text), softmobile.snapshot_step(bigint), softmobile.recycle_segments(interval), softmobile.close_lanes(), softmobile.automatic_reason(), softmobile.tile_size(), softmobile.write_tiles(integer, bigint, bigint), softmobile.verify_question(text, bigint), softmobile.take_verification(text, text) TO %I', role);
		ELSE
			RAISE EXCEPTION 'unknown kind of role "%"', kind
				USING ERRCODE = 'invalid_parameter_value', HINT = 'Use operator, auditor, app or worker.';
	END CASE;
	IF kind <> 'worker' THEN
		-- Where receipts are.
		EXECUTE format('GRANT SELECT ON softmobile.folio_control, softmobile.sync_discrepancy TO %I', role);
		EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.folio_control_of(text, date, date), softmobile.sync_explain(text, text) TO %I', role);
	END IF;
	IF kind IN ('app', 'operator') THEN
		EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.reconcile(text, date, date), softmobile.resolve_discrepancy(bigint, text) TO %I', role);
	END IF;
END
$$;
COMMENT ON FUNCTION softmobile.grant_role(name, text) IS
'Grants a role what its kind needs. app: sells, runs sync_run() and the checklist, sees figures but no payloads, and the reference data; operator: also the preparation of a cut, the queue, retries, branches; auditor: reads everything of the queue, changes nothing; worker: what softmobile.worker_role must have. Errors: 42704, 22023. Run by the owner of the extension.';

REVOKE ALL ON ALL TABLES IN SCHEMA softmobile FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA softmobile FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA softmobile FROM PUBLIC;
GRANT EXECUTE ON FUNCTION softmobile.set_reason(text), softmobile.current_reason() TO PUBLIC;
