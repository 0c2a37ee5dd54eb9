/*
 * Headquarters: what central keeps, and central_receive(), by which the gateway
 * stores a batch in one transaction.
 *
 * - An event's identity is (branch, id).  Replays and resends are known by it, never
 *   by their number, so an Idempotency-Key adds nothing and is not kept.
 * - A branch's row in central_branch is the lock of all that is kept of the branch:
 *   its batches follow one another, and a doubled batch sees the first one's events.
 * - The projection holds the latest row of every entity, and takes only what is newer
 *   by (epoch_no, seq).  Snapshot events are older than any other.
 * - central_span holds, as ranges, the numbers that were received.  A new id with a
 *   number that is there already is a fork; no index over the inbox is needed to see it.
 * - Every key begins with the branch: the whole shards by branch.
 */

CREATE TABLE softmobile.central_branch (
	branch_id text COLLATE "C" PRIMARY KEY,
	active boolean NOT NULL DEFAULT true,
	first_seen timestamptz NOT NULL DEFAULT now(),
	last_seen timestamptz
) WITH (fillfactor = 50);
COMMENT ON TABLE softmobile.central_branch IS 'Branches that have or had a token. active = false: nothing is taken from it. The row is locked while a batch of the branch is stored.';

CREATE TABLE softmobile.central_token (
	token_hash bytea PRIMARY KEY CHECK (octet_length(token_hash) = 32),
	label text NOT NULL,
	branches text[] COLLATE "C" NOT NULL,
	created_at timestamptz NOT NULL DEFAULT now(),
	expires_at timestamptz,
	revoked_at timestamptz
);
COMMENT ON TABLE softmobile.central_token IS 'Bearer tokens, as SHA-256; who holds one may write events of its branches. Several may be valid for a branch: rotation without a gap.';

CREATE TABLE softmobile.central_lane (
	branch_id text COLLATE "C" NOT NULL,
	epoch uuid NOT NULL,
	lane text COLLATE "C" NOT NULL,
	epoch_no integer NOT NULL,
	highest_seq bigint NOT NULL,
	events bigint NOT NULL,
	last_received_at timestamptz,
	PRIMARY KEY (branch_id, epoch, lane)
) WITH (fillfactor = 50);
COMMENT ON TABLE softmobile.central_lane IS 'Lanes that have sent, or were named when their branch verified.';
COMMENT ON COLUMN softmobile.central_lane.highest_seq IS 'Highest number received, or 0; a new event at or below it is late, sent again after a loss at central, or a fork.';

CREATE TABLE softmobile.central_span (
	branch_id text COLLATE "C" NOT NULL,
	epoch uuid NOT NULL,
	lane text COLLATE "C" NOT NULL,
	void boolean NOT NULL,
	first_seq bigint NOT NULL,
	last_seq bigint NOT NULL,
	PRIMARY KEY (branch_id, epoch, lane, void, first_seq)
) WITH (fillfactor = 50);
COMMENT ON TABLE softmobile.central_span IS 'Numbers of a lane as ranges that neither touch nor overlap: received (an event of this number is in the inbox), or void (rolled back, as the branch declared). Rows, not one multirange: with many gaps that would be rewritten whole by each batch.';

CREATE TABLE softmobile.central_inbox (
	branch_id text COLLATE "C" NOT NULL,
	id uuid NOT NULL,
	epoch uuid NOT NULL,
	seq bigint NOT NULL,
	event_time timestamptz NOT NULL,
	received_at timestamptz NOT NULL,
	epoch_no integer NOT NULL,
	lane text COLLATE "C" NOT NULL,
	entity_type text COLLATE "C" NOT NULL,
	entity_id text COLLATE "C" NOT NULL,
	op text COLLATE "C" NOT NULL,
	effect text COLLATE "C" NOT NULL,
	actor text,
	reason text,
	data json NOT NULL,
	PRIMARY KEY (branch_id, id)
);
COMMENT ON TABLE softmobile.central_inbox IS 'Every event received, once; rejected ones are not received. Deduplication lasts as long as its rows are kept.';
COMMENT ON COLUMN softmobile.central_inbox.effect IS 'applied: it made the projection''s row, or one of those before; older: the projection held something newer; conflict: see central_conflicts; overruled: a conflict that was resolved for central''s row.';
COMMENT ON COLUMN softmobile.central_inbox.data IS 'The event''s data, byte for byte.';

CREATE TABLE softmobile.central_projection (
	branch_id text COLLATE "C" NOT NULL,
	entity_type text COLLATE "C" NOT NULL,
	entity_id text COLLATE "C" NOT NULL,
	seq bigint NOT NULL,
	changed_at timestamptz NOT NULL,
	epoch_no integer NOT NULL,
	deleted boolean NOT NULL,
	changed_here boolean NOT NULL,
	row jsonb,
	PRIMARY KEY (branch_id, entity_type, entity_id),
	CHECK (deleted = (row IS NULL))
) WITH (fillfactor = 80);
COMMENT ON TABLE softmobile.central_projection IS 'The latest row of every entity, by branch.';
COMMENT ON COLUMN softmobile.central_projection.seq IS 'With epoch_no: the event that made this row; only newer ones replace it. epoch_no 0: a snapshot event; -1: only headquarters.';
COMMENT ON COLUMN softmobile.central_projection.changed_here IS 'Headquarters holds values that the branch does not know, by central_change(): the branch''s change of the same columns is a conflict, of other columns is merged.';
COMMENT ON COLUMN softmobile.central_projection.deleted IS 'The row was deleted; kept, so that nothing older brings it back.';

CREATE TABLE softmobile.central_conflict (
	branch_id text COLLATE "C" NOT NULL,
	id uuid NOT NULL,
	central_row jsonb,
	detail text NOT NULL,
	detected_at timestamptz NOT NULL,
	resolved_at timestamptz,
	PRIMARY KEY (branch_id, id)
);
COMMENT ON TABLE softmobile.central_conflict IS 'Events that were answered as conflict, with the row that central held then.';

CREATE TABLE softmobile.central_fork (
	branch_id text COLLATE "C" NOT NULL,
	id uuid NOT NULL,
	epoch uuid NOT NULL,
	lane text COLLATE "C" NOT NULL,
	seq bigint NOT NULL,
	seen_at timestamptz NOT NULL,
	PRIMARY KEY (branch_id, id)
);
COMMENT ON TABLE softmobile.central_fork IS 'Events whose number their lane had used for another event: the branch''s server was cloned, or set back without noticing. Both events are kept.';

CREATE TABLE softmobile.central_audit (
	id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
	at timestamptz NOT NULL DEFAULT clock_timestamp(),
	action text NOT NULL,
	branch_id text COLLATE "C",
	reason text,
	details jsonb,
	session_user_name text NOT NULL DEFAULT session_user,
	current_user_name text NOT NULL,
	client_addr inet DEFAULT inet_client_addr(),
	application_name text DEFAULT current_setting('application_name')
);
COMMENT ON TABLE softmobile.central_audit IS 'Who changed what at headquarters, and why.';

DO $$
DECLARE
	t regclass;
BEGIN
	FOREACH t IN ARRAY '{softmobile.central_branch, softmobile.central_token, softmobile.central_lane, softmobile.central_span,
		softmobile.central_inbox, softmobile.central_projection, softmobile.central_conflict, softmobile.central_fork,
		softmobile.central_audit, softmobile.central_audit_id_seq}'::regclass[] LOOP
		PERFORM pg_extension_config_dump(t, '');
	END LOOP;
END
$$;

/* Tokens. */

CREATE FUNCTION softmobile.central_create_token(branches text[], label text, expires_at timestamptz DEFAULT NULL) RETURNS text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	token text := translate(gen_random_uuid()::text || gen_random_uuid()::text, '-', '');
BEGIN
	IF coalesce(cardinality(branches), 0) = 0 OR array_position(branches, NULL) IS NOT NULL OR '' = ANY (branches) THEN
		RAISE EXCEPTION 'a token needs at least one branch'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Name the branches that its holder may send for.';
	END IF;
	IF EXISTS (SELECT FROM unnest(branches) AS b WHERE octet_length(b) > 100 OR b ~ '[[:cntrl:]]' OR b <> btrim(b)) THEN
		RAISE EXCEPTION 'branch id cannot be used'
			USING ERRCODE = 'invalid_parameter_value', DETAIL = 'A branch id has 1 to 100 bytes, no control characters and no spaces around it.',
				HINT = 'Use the id that the branch itself has in softmobile.branch.';
	END IF;
	IF btrim(coalesce(label, '')) = '' THEN
		RAISE EXCEPTION 'a token needs a label'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Say what it is for, such as ''branch server 7''; central_revoke_token() takes it.';
	END IF;
	INSERT INTO softmobile.central_branch (branch_id) SELECT DISTINCT b FROM unnest(branches) AS b ON CONFLICT DO NOTHING;
	INSERT INTO softmobile.central_token (token_hash, label, branches, expires_at)
	VALUES (sha256(convert_to(token, 'UTF8')), label, branches, expires_at);
	INSERT INTO softmobile.central_audit (action, details, current_user_name)
	VALUES ('create_token', jsonb_build_object('label', label, 'branches', branches, 'expires_at', expires_at), softmobile.calling_role());
	RETURN token;
END
$$;
COMMENT ON FUNCTION softmobile.central_create_token(text[], text, timestamptz) IS
'Makes a bearer token for branches and returns it, this once: central keeps only its hash. Put it into the file that the branch''s softmobile.auth_token_file names. Errors: 22023.';

CREATE FUNCTION softmobile.central_revoke_token(label text) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	n bigint;
BEGIN
	UPDATE softmobile.central_token t SET revoked_at = now() WHERE t.label = label AND t.revoked_at IS NULL;
	GET DIAGNOSTICS n = ROW_COUNT;
	IF n = 0 THEN
		RAISE EXCEPTION 'there is no valid token labelled "%"', label
			USING ERRCODE = 'undefined_object', HINT = 'SELECT label FROM softmobile.central_token WHERE revoked_at IS NULL lists them.';
	END IF;
	INSERT INTO softmobile.central_audit (action, details, current_user_name)
	VALUES ('revoke_token', jsonb_build_object('label', label, 'tokens', n), softmobile.calling_role());
	RETURN n;
END
$$;
COMMENT ON FUNCTION softmobile.central_revoke_token(text) IS 'Revokes the tokens with a label, at once. Returns how many. Error: 42704 none valid.';
