/*
 * Capture: reasons, the log, branches and lanes.
 */

CREATE FUNCTION softmobile.set_reason(reason text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'softmobile_set_reason';
COMMENT ON FUNCTION softmobile.set_reason(text) IS
'Sets the reason of the rest of this transaction. Argument: at least 5 characters after trimming, at most 2000 bytes, no control characters. Errors: 22004 NULL, 22023 unusable, 23514 too short.';

CREATE FUNCTION softmobile.current_reason() RETURNS text
LANGUAGE c STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'softmobile_current_reason';
COMMENT ON FUNCTION softmobile.current_reason() IS
'The reason that a change would carry now, trimmed; NULL when there is none. A row''s own reason column is not looked at.';

CREATE FUNCTION softmobile.capture() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'softmobile_capture';
COMMENT ON FUNCTION softmobile.capture() IS
'Trigger of attached tables: writes the outbox event of a changed row. Errors: 23514 reason missing, 23503 branch unknown (softmobile.unknown_branch = refuse).';

CREATE FUNCTION softmobile.refuse_truncate() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'softmobile_refuse_truncate';
COMMENT ON FUNCTION softmobile.refuse_truncate() IS 'Trigger of attached tables: refuses TRUNCATE (0A000).';

CREATE FUNCTION softmobile.refuse_change() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'softmobile_refuse_change';
COMMENT ON FUNCTION softmobile.refuse_change() IS 'Trigger of the log: refuses UPDATE, DELETE and TRUNCATE to everyone (42501).';

CREATE FUNCTION softmobile.lanes_changed() RETURNS void
LANGUAGE c AS 'MODULE_PATHNAME', 'softmobile_lanes_changed';
COMMENT ON FUNCTION softmobile.lanes_changed() IS 'Internal: makes all backends read branches, lanes and segments anew once this transaction commits.';

CREATE FUNCTION softmobile.captures_changed() RETURNS void
LANGUAGE c AS 'MODULE_PATHNAME', 'softmobile_captures_changed';
COMMENT ON FUNCTION softmobile.captures_changed() IS 'Internal: makes all backends read attached tables anew once this transaction commits.';

CREATE FUNCTION softmobile.poke() RETURNS void
LANGUAGE c AS 'MODULE_PATHNAME', 'softmobile_poke';
COMMENT ON FUNCTION softmobile.poke() IS 'Wakes this database''s worker when this transaction commits. Nothing happens where softmobile is not preloaded.';

CREATE FUNCTION softmobile.url_problem(url text) RETURNS text
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'softmobile_url_problem';
COMMENT ON FUNCTION softmobile.url_problem(text) IS 'What keeps a text from being a central_url; NULL: nothing.';

CREATE FUNCTION softmobile.capture_existing(relation regclass, from_block bigint, to_block bigint, actor text, reason text) RETURNS bigint
LANGUAGE c SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'softmobile_capture_existing';
COMMENT ON FUNCTION softmobile.capture_existing(regclass, bigint, bigint, text, text) IS
'Internal, for the worker: queues the rows in blocks from_block to to_block - 1 as they are now, for attach(initial => ''snapshot''). Returns the number of events; NULL when somebody has locked the table.';

-- The log refuses every change, to its owner too and in replica mode.
DO $$
DECLARE
	t regclass;
BEGIN
	FOREACH t IN ARRAY '{softmobile.outbox_event, softmobile.outbox_event_1, softmobile.outbox_event_2, softmobile.outbox_event_3, softmobile.outbox_event_4}'::regclass[] LOOP
		EXECUTE format('CREATE TRIGGER refuse_row_change BEFORE UPDATE OR DELETE ON %s FOR EACH ROW EXECUTE FUNCTION softmobile.refuse_change()', t);
		EXECUTE format('CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION softmobile.refuse_change()', t);
		EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER refuse_row_change, ENABLE ALWAYS TRIGGER refuse_truncate', t);
	END LOOP;
END
$$;

/* Audit. */

CREATE FUNCTION softmobile.record_audit(action text, branch text, reason text, events bigint, ids uuid[], details jsonb, asked_by text) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	INSERT INTO softmobile.audit (action, branch_id, reason, events, ids, details, current_user_name)
	VALUES (action, branch, reason, events, ids, details, asked_by)
	RETURNING id;
END;
COMMENT ON FUNCTION softmobile.record_audit(text, text, text, bigint, uuid[], jsonb, text) IS
'Internal: writes a row of sync_audit. asked_by: the role that was current when the user called.';

/* Lanes. */

CREATE FUNCTION softmobile.revoke_defaults(relation regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	command text;
BEGIN
	FOR command IN
		SELECT format('REVOKE ALL ON %s %s FROM %s', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, relation,
			CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END)
		FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) AS a
		WHERE c.oid = relation AND a.grantee <> c.relowner GROUP BY c.relkind, a.grantee
	LOOP
		EXECUTE command;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.revoke_defaults(regclass) IS
'Internal: takes away what ALTER DEFAULT PRIVILEGES has given others on a table or sequence just made: payloads are not read, and numbers not set, by who may read and set everything else.';

CREATE FUNCTION softmobile.add_lanes(branch text, epoch integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	word text;
	new_lane integer;
BEGIN
	-- HIGH is last: its events then go to the right edge of the log's index, where inserting is cheapest.
	FOREACH word IN ARRAY '{LOW, NORMAL, HIGH}'::text[] LOOP
		new_lane := nextval('softmobile.outbox_lane_lane_id_seq');
		INSERT INTO softmobile.outbox_lane (lane_id, branch_id, priority, epoch_no, log_id)
		VALUES (new_lane, branch, word, epoch, new_lane);
		EXECUTE format('CREATE SEQUENCE softmobile.%I CACHE 1 OWNED BY softmobile.outbox_lane.lane_id', 'lane_' || new_lane || '_seq');
		PERFORM softmobile.revoke_defaults(format('softmobile.%I', 'lane_' || new_lane || '_seq')::regclass);
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.add_lanes(text, integer) IS 'Internal: adds the three lanes of a branch (NULL: of the unregistered) in an epoch, with their sequences.';

CREATE FUNCTION softmobile.add_branch_lanes(branch text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	current_epoch integer := (SELECT max(e.epoch_no) FROM softmobile.outbox_epoch e WHERE e.registered);
BEGIN
	IF NOT EXISTS (SELECT FROM softmobile.outbox_lane l WHERE l.branch_id = branch AND l.epoch_no = current_epoch) THEN
		PERFORM softmobile.add_lanes(branch, current_epoch);
	END IF;
	-- What was captured for this branch before it had lanes of its own.
	INSERT INTO softmobile.outbox_lane (branch_id, priority, epoch_no, log_id)
	SELECT branch, u.priority, u.epoch_no, u.lane_id
	FROM softmobile.outbox_lane u
	WHERE u.branch_id IS NULL AND NOT u.closed
		AND NOT EXISTS (SELECT FROM softmobile.outbox_lane l WHERE l.branch_id = branch AND l.log_id = u.lane_id);
	PERFORM softmobile.lanes_changed();
END
$$;
COMMENT ON FUNCTION softmobile.add_branch_lanes(text) IS
'Internal: gives a branch its lanes in the current epoch, and lanes that deliver what was captured for it while it was unregistered.';

-- A restore from a dump brings lanes by COPY, after the worker has begun, and their branches and epochs before or after them.
CREATE FUNCTION softmobile.follow_lanes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	PERFORM softmobile.lanes_changed();
	PERFORM softmobile.poke();
	RETURN NULL;
END
$$;
COMMENT ON FUNCTION softmobile.follow_lanes() IS 'Trigger of outbox_lane, outbox_epoch and branch: whoever knows the lanes reads them anew.';
CREATE TRIGGER follow_lanes AFTER INSERT ON softmobile.outbox_lane FOR EACH STATEMENT EXECUTE FUNCTION softmobile.follow_lanes();
CREATE TRIGGER follow_lanes AFTER INSERT ON softmobile.outbox_epoch FOR EACH STATEMENT EXECUTE FUNCTION softmobile.follow_lanes();
CREATE TRIGGER follow_lanes AFTER INSERT ON softmobile.branch FOR EACH STATEMENT EXECUTE FUNCTION softmobile.follow_lanes();

CREATE FUNCTION softmobile.open_epoch(why text) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	-- Seconds since 2020, doubled: a database restored from a dump gets a number above all that the dump holds.
	base integer := greatest(2 * extract(epoch FROM clock_timestamp() - timestamptz '2020-01-01 00:00:00+00')::bigint,
							 (SELECT coalesce(max(e.epoch_no) + 1, 0) FROM softmobile.outbox_epoch e));
	b text;
BEGIN
	base := base + base % 2;
	INSERT INTO softmobile.outbox_epoch (epoch_no, epoch, registered, why)
	VALUES (base, gen_random_uuid(), false, why), (base + 1, gen_random_uuid(), true, why);
	PERFORM softmobile.add_lanes(NULL, base);
	FOR b IN SELECT branch_id FROM softmobile.branch ORDER BY branch_id LOOP
		PERFORM softmobile.add_branch_lanes(b);
	END LOOP;
	PERFORM softmobile.lanes_changed();
	PERFORM softmobile.poke();
	RETURN base + 1;
END
$$;
COMMENT ON FUNCTION softmobile.open_epoch(text) IS
'Internal: begins a new generation of lanes for all branches; the older lanes drain first. why: kept with the epoch.';

CREATE FUNCTION softmobile.make_way() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	above integer;
BEGIN
	IF EXISTS (SELECT FROM softmobile.outbox_epoch e WHERE e.epoch_no = new.epoch_no) THEN
		-- An hour ahead of the clock: above what else the dump may hold.
		SELECT 2 * (max(e.epoch_no) / 2 + 3600) INTO above FROM softmobile.outbox_epoch e;
		UPDATE softmobile.outbox_lane l SET epoch_no = above + l.epoch_no % 2 WHERE l.epoch_no / 2 = new.epoch_no / 2;
		UPDATE softmobile.outbox_epoch e SET epoch_no = above + e.epoch_no % 2 WHERE e.epoch_no / 2 = new.epoch_no / 2;
		PERFORM softmobile.lanes_changed();
	END IF;
	RETURN new;
END
$$;
COMMENT ON FUNCTION softmobile.make_way() IS 'Trigger of outbox_epoch: a dump restored in the second in which it was begun brings the epoch that the new installation has just opened; that one moves up.';
CREATE TRIGGER make_way BEFORE INSERT ON softmobile.outbox_epoch FOR EACH ROW EXECUTE FUNCTION softmobile.make_way();

-- A restore brings the lanes of the dumped database to those that are made here. Their numbers, which name sequences,
-- must differ, even if it was dumped a second ago: each installation begins in one of half a million places.
SELECT setval('softmobile.outbox_lane_lane_id_seq', 1 + 4096 * floor(random() * 500000)::bigint);
SELECT softmobile.open_epoch('installed');

/* Branches. */

CREATE FUNCTION softmobile.register_branch(branch_id text, name text, central_url text DEFAULT NULL, active boolean DEFAULT true, receipts text DEFAULT 'required') RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	problem text;
	may_redirect CONSTANT boolean := has_parameter_privilege(softmobile.calling_role(), 'softmobile.central_url', 'SET');
	who_may CONSTANT text := format('A superuser may, and whom one allows it: GRANT SET ON PARAMETER softmobile.central_url TO %I.', softmobile.calling_role());
BEGIN
	branch_id := btrim(branch_id);
	IF branch_id IS NULL OR octet_length(branch_id) NOT BETWEEN 1 AND 100 OR branch_id ~ '[[:cntrl:]]' THEN
		RAISE EXCEPTION 'branch id cannot be used'
			USING ERRCODE = 'invalid_parameter_value', DETAIL = 'A branch id has 1 to 100 bytes and no control characters.',
				HINT = 'Use the value that stands in the branch column of the captured tables.';
	END IF;
	IF name IS NULL OR btrim(name) = '' THEN
		RAISE EXCEPTION 'branch "%" needs a name', branch_id
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Give the name that people know the branch by.';
	END IF;
	IF receipts IS NULL OR receipts NOT IN ('required', 'none') THEN
		RAISE EXCEPTION 'unknown value "%" for receipts', receipts
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use ''required'', or ''none'' for a sink that answers an empty 2xx.';
	END IF;
	central_url := nullif(central_url, '');
	problem := softmobile.url_problem(central_url);
	IF problem IS NOT NULL THEN
		RAISE EXCEPTION 'invalid central_url for branch "%"', branch_id
			USING ERRCODE = 'invalid_parameter_value', DETAIL = problem,
				HINT = 'Use the base URL of the central server, such as https://central.example/softmobile.';
	END IF;
	-- The token goes there, and all that the branch sells.
	IF central_url IS DISTINCT FROM (SELECT b.central_url FROM softmobile.branch b WHERE b.branch_id = branch_id)
		AND NOT may_redirect THEN
		RAISE EXCEPTION 'permission denied to change the central_url of branch "%"', branch_id
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'It says where events and the token are sent, as the setting softmobile.central_url does.',
				HINT = who_may;
	END IF;

	-- Any server could say that it has them.
	IF receipts = 'none' AND receipts IS DISTINCT FROM (SELECT b.receipts FROM softmobile.branch b WHERE b.branch_id = branch_id)
		AND NOT may_redirect THEN
		RAISE EXCEPTION 'permission denied to let branch "%" do without receipts', branch_id
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'Events would count as delivered that no central has acknowledged.',
				HINT = who_may;
	END IF;

	-- The worker, which registers unknown branches, tries this lock and never waits for it.
	PERFORM pg_advisory_xact_lock(softmobile.branch_lock_class(), hashtext(branch_id));
	INSERT INTO softmobile.branch AS b (branch_id, name, central_url, active, receipts, registered_by)
	VALUES (branch_id, btrim(name), central_url, coalesce(active, true), receipts, softmobile.calling_role())
	ON CONFLICT ON CONSTRAINT branch_pkey DO UPDATE
	SET name = excluded.name, central_url = excluded.central_url, active = excluded.active, receipts = excluded.receipts,
		registered_by = CASE b.registered_by WHEN 'first sight' THEN excluded.registered_by ELSE b.registered_by END;
	PERFORM softmobile.add_branch_lanes(branch_id);
	PERFORM softmobile.record_audit('register_branch', branch_id, softmobile.current_reason(), NULL, NULL,
		jsonb_build_object('name', btrim(name), 'central_url', central_url, 'active', active, 'receipts', receipts), softmobile.calling_role());
	PERFORM softmobile.poke();
END
$$;

CREATE FUNCTION softmobile.branch_lock_class() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1936878957;
COMMENT ON FUNCTION softmobile.branch_lock_class() IS 'Internal: first key of the advisory locks on branch ids.';

CREATE FUNCTION softmobile.calling_role() RETURNS text
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'softmobile_calling_role';
COMMENT ON FUNCTION softmobile.calling_role() IS 'Internal: the role that the session acts as, not changed by SECURITY DEFINER.';
COMMENT ON FUNCTION softmobile.register_branch(text, text, text, boolean, text) IS
'Registers a branch or changes a registered one (also: active => false switches its delivery off, true on). central_url NULL: the setting of that name; receipts ''none'': an empty 2xx settles. Errors: 22023; 42501 a central_url that is not the one there, or receipts ''none'' anew, from who may not set softmobile.central_url.';

CREATE FUNCTION softmobile.register_unknown_branches(branches text[]) RETURNS text[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	b text;
	done text[] := '{}';
BEGIN
	FOREACH b IN ARRAY branches LOOP
		CONTINUE WHEN NOT pg_try_advisory_xact_lock(softmobile.branch_lock_class(), hashtext(b));
		INSERT INTO softmobile.branch (branch_id, name, registered_by) VALUES (b, b, 'first sight')
		ON CONFLICT DO NOTHING;
		PERFORM softmobile.add_branch_lanes(b);
		done := done || b;
	END LOOP;
	RETURN done;
END
$$;
COMMENT ON FUNCTION softmobile.register_unknown_branches(text[]) IS
'Internal, for the worker: registers branches met in rows (name = id) and gives them lanes. Returns those done; one that a user is just registering is left for later.';
