/*
 * Branch ids are text; where they look like numbers, integers are accepted.  The
 * argument has a name of its own, so that calls with named arguments (PostgREST)
 * stay unambiguous.
 */

CREATE FUNCTION softmobile.register_branch(branch_number bigint, name text, central_url text DEFAULT NULL, active boolean DEFAULT true, receipts text DEFAULT 'required') RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT softmobile.register_branch(branch_number::text, name, central_url, active, receipts);
END;
COMMENT ON FUNCTION softmobile.register_branch(bigint, text, text, boolean, text) IS 'register_branch() for a branch id that is a number.';

CREATE FUNCTION softmobile.sync_run(branch_number bigint, timeout interval DEFAULT '60 s') RETURNS SETOF softmobile.sync_history
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT * FROM softmobile.sync_run(branch_number::text, timeout);
END;
COMMENT ON FUNCTION softmobile.sync_run(bigint, interval) IS 'sync_run() for a branch id that is a number.';

CREATE FUNCTION softmobile.requeue_failed_outbox_entries(branch_number bigint, min_age interval DEFAULT NULL) RETURNS bigint
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT softmobile.requeue_failed_outbox_entries(branch_number::text, min_age);
END;
COMMENT ON FUNCTION softmobile.requeue_failed_outbox_entries(bigint, interval) IS 'requeue_failed_outbox_entries() for a branch id that is a number.';

CREATE FUNCTION softmobile.resend(branch_number bigint, lane text, seqs int8multirange, reason text, epoch uuid DEFAULT NULL) RETURNS bigint
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT softmobile.resend(branch_number::text, lane, seqs, reason, epoch);
END;
COMMENT ON FUNCTION softmobile.resend(bigint, text, int8multirange, text, uuid) IS 'resend() for a branch id that is a number.';
